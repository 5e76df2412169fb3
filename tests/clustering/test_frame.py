"""Frames: an offset or a scale that all rows have changes no clustering and no whitening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.clustering.frame import frame_of
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.points import unit_rows
from deepclust.clustering.whiten import Whitening
from deepclust.errors import NumericalError

GROUPS = 5


def rows() -> np.ndarray:
    draws = np.random.default_rng(0)
    return np.repeat(np.eye(GROUPS, 8), 60, axis=0) + 0.05 * draws.standard_normal((300, 8))


def reference(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    """Return assignments and inertia of Lloyd in float64."""
    for _ in range(iterations):
        nearest = ((x[:, None] - centroids) ** 2).sum(2).argmin(1)
        centroids = np.stack([x[nearest == j].mean(0) for j in range(len(centroids))])
    squared = ((x[:, None] - centroids) ** 2).sum(2)
    return squared.argmin(1), float(squared.min(1).sum())


def check_geometry(result: KMeansResult, x: np.ndarray) -> None:
    squared = ((x[:, None] - result.centroids) ** 2).sum(2)
    np.testing.assert_array_equal(result.assignments, squared.argmin(1))
    assert result.inertia == pytest.approx(squared.min(1).sum(), rel=1e-5)
    np.testing.assert_allclose(result.distances, squared.min(1), rtol=1e-3)


@pytest.mark.parametrize("offset", [1e3, 5e6, 1e8, -1e9])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e19, 1e60])
def test_k_means_is_that_of_a_float64_reference_at_any_offset_and_scale(
    offset: float, scale: float
) -> None:
    x = (rows() + offset) * scale
    start = x[::60]
    result = kmeans(x, GROUPS, iterations=3, init=start)
    assignments, inertia = reference((x - start[0]) / scale, (start - start[0]) / scale, 3)
    np.testing.assert_array_equal(result.assignments, assignments)
    assert result.inertia / scale**2 == pytest.approx(inertia, rel=1e-4)
    assert result.history[0].inertia > result.history[-1].inertia / 2
    check_geometry(result, x) if scale == 1 else None


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e9, 1e9), st.integers(-300, 300), st.booleans())
def test_offset_and_scale_change_no_assignment(offset: float, power: int, spherical: bool) -> None:
    x = rows()
    moved = x * 2.0**power if spherical else (x + offset) * 2.0**power
    a, b = (kmeans(y, GROUPS, init="k-means++", spherical=spherical) for y in (x, moved))
    np.testing.assert_array_equal(a.assignments, b.assignments)


def test_float32_rows_keep_every_bit_whatever_their_scale() -> None:
    x = (rows() + 300).astype(np.float32)
    plain = kmeans(x, GROUPS)
    for same in (x.astype(np.float64), torch.from_numpy(x).double()):
        result = kmeans(same, GROUPS)
        assert result.centroids.dtype == np.float32
        np.testing.assert_array_equal(result.centroids, plain.centroids)
    scaled = kmeans(x * np.float32(2.0**-90), GROUPS)
    np.testing.assert_array_equal(scaled.centroids, plain.centroids * 2.0**-90)
    assert scaled.inertia == plain.inertia * 2.0**-180


def test_computing_twice_gives_the_same_bits_in_memory_and_on_disk(tmp_path: Path) -> None:
    x = rows() + 1e8
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    once, again = (kmeans(y, GROUPS) for y in (x, mapped))
    np.testing.assert_array_equal(once.centroids, again.centroids)
    first, second = (Whitening.fit(y, 4) for y in (x, mapped))
    np.testing.assert_array_equal(first(x), second(mapped))


def test_fixed_centroids_come_back_to_the_bit_far_from_the_origin() -> None:
    x = rows() + 1e8
    result = kmeans(x, GROUPS, fixed=x[:2], progress=lambda one: None)
    np.testing.assert_array_equal(result.centroids[:2], x[:2])
    check_geometry(result, x)


@pytest.mark.parametrize("change", [lambda x: x + 1e8, lambda x: x * 1e-30, lambda x: x * 1e100])
def test_whitening_depends_on_no_offset_and_scale(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    x = rows()
    plain, moved = Whitening.fit(x, 4), Whitening.fit(change(x), 4)
    assert moved.rank == 4
    moved.save(tmp_path / "whitening.safetensors")
    loaded = Whitening.load(tmp_path / "whitening.safetensors")
    np.testing.assert_allclose(loaded(change(x)), plain(x), atol=1e-3)
    np.testing.assert_array_equal(loaded(change(x)), moved(change(x)))


def test_constant_columns_far_from_the_origin_are_rank_and_no_noise() -> None:
    x = np.concatenate([rows()[:, :3] + 1e8, np.full((300, 2), 0.1 + 1e8)], axis=1)
    assert Whitening.fit(x, 5).rank == 3


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_value_that_float32_cannot_hold_beside_the_others_is_named(value: float) -> None:
    x = rows()
    x[7, 3] = value
    for work in (lambda: kmeans(x, GROUPS), lambda: Whitening.fit(x, 4)):
        with pytest.raises(NumericalError, match=rf"row 7 holds {value:g}".replace("+", r"\+")):
            work()
    single = rows().astype(np.float32)
    single[9, 0] = 1e20
    with pytest.raises(NumericalError, match="row 9 holds 1e"):
        Whitening.fit(single, 4)


def test_rows_without_any_difference_or_without_any_row_need_no_frame() -> None:
    assert frame_of(np.zeros((4, 2))) is None
    assert frame_of(np.zeros((0, 2))) is None
    assert frame_of(np.full((4, 2), np.nan)) is None
    with pytest.raises(NumericalError, match="row 0, 1"):
        kmeans(np.full((4, 2), np.inf), 2)
    far = frame_of(np.full((4, 2), 1e8 + 0.1))
    assert far is not None
    assert not far.narrow(torch.full((4, 2), 1e8 + 0.1, dtype=torch.float64)).any()


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e19, 1e38])
def test_unit_rows_of_any_length_have_length_one(scale: float) -> None:
    x = torch.from_numpy(rows() / 2).float() * scale
    np.testing.assert_allclose(torch.linalg.vector_norm(unit_rows(x), dim=1), 1, rtol=1e-6)
    assert not unit_rows(torch.zeros(2, 3)).any()


def test_integers_above_what_float32_holds_are_centred_too() -> None:
    x = np.round(rows() * 1000).astype(np.int64)
    near, far = kmeans(x, GROUPS, init="k-means++"), kmeans(x + 2**40, GROUPS, init="k-means++")
    np.testing.assert_array_equal(near.assignments, far.assignments)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-4)
