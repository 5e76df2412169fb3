"""Bounds of distances save searches, and never change which centroid is the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepclust import kmeans
from deepclust.clustering import array_points, nearest, tile_sizes
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.exact_sums import ClusterSums
from deepclust.clustering.nearest import Nearest, Packed, Take
from deepclust.clustering.points import Assignment
from deepclust.errors import NumericalError
from tests.clustering.test_nearest import noise, reference


@pytest.fixture(autouse=True)
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess in float32 on any CPU."""
    monkeypatch.setattr(nearest, "half_is_faster", lambda: False)


def moved(centroids: Tensor, share: float, seed: int) -> Tensor:
    """Centroids of which a share moves by about their spread, and the others by a thousandth."""
    draws = torch.Generator().manual_seed(seed)
    far = torch.rand(len(centroids), 1, generator=draws) < share
    return centroids + noise(*centroids.shape, seed) * torch.where(far, 1.0, 1e-3)


def check(points: ArrayPoints, centroids: Tensor, before: Assignment | None) -> Assignment:
    """A pass that finds what a slow search finds, and leaves bounds that hold."""
    found = points.assign_to(centroids, before, distances=False)
    assert isinstance(points.rows, Tensor)
    assert points.kept is not None
    assert points.kept.bounds is not None
    assert torch.equal(found.cluster_ids.long(), reference(points.rows, centroids))
    distances = torch.cdist(points.rows.double(), centroids.double())
    own = distances.gather(1, found.cluster_ids.long()[:, None])[:, 0].numpy()
    others = distances.scatter(1, found.cluster_ids.long()[:, None], torch.inf).amin(1).numpy()
    assert (points.kept.bounds.near >= own).all()
    assert (points.kept.bounds.far <= others).all()
    return found


@given(
    n=st.integers(1, 600), dim=st.integers(1, 70), k=st.integers(1, 90), seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 3.0, 100.0]), spread=st.sampled_from([1e-3, 1.0, 1e3]),
    share=st.sampled_from([0.0, 0.1, 1.0]), copies=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_passes_one_after_the_other_find_the_smallest_distances(
    n: int, dim: int, k: int, seed: int, offset: float, spread: float, share: float, copies: bool
) -> None:
    rows, centroids = noise(n, dim, seed), noise(k, dim, seed + 1)
    if copies:  # of rows and of centroids
        rows, centroids = rows[: n // 3 + 1].repeat(3, 1), centroids[: k // 2 + 1].repeat(2, 1)
    points, before = ArrayPoints(rows * spread + offset), None
    for step in range(5):
        before = check(points, centroids * spread + offset, before)
        centroids = moved(centroids, share, seed + step)


def test_more_centroids_than_fit_beside_a_score_are_told_apart() -> None:
    rows, centroids = noise(300, 6, 0), noise(5000, 6, 1)
    points, before = ArrayPoints(rows), None
    for step in range(3):
        before = check(points, centroids, before)
        centroids = moved(centroids, 0.01, step)


def test_a_row_that_keeps_its_centroid_is_not_looked_at() -> None:
    rows, centroids = noise(4000, 16, 0) + 20 * noise(8, 16, 1).repeat(500, 1), noise(8, 16, 1)
    points = ArrayPoints(rows)
    before = check(points, 20 * centroids, None)
    assert points.kept is not None
    points.kept.rows.fill_(torch.nan)
    after = points.assign_to(20 * centroids + 0.01, before, distances=False)
    assert torch.equal(after.cluster_ids, before.cluster_ids)


def test_rows_that_bounds_leave_open_are_searched_with_few_scores_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, search = [], Nearest.search

    def noted(self: Nearest, packed: Packed, take: Take) -> Tensor:
        sizes.append(len(packed[0]))
        return search(self, packed, take)

    monkeypatch.setattr(Nearest, "search", noted)
    monkeypatch.setitem(tile_sizes.TILE, "cpu", 2**12)
    check(ArrayPoints(noise(900, 6, 0), threads=1), noise(1, 6, 1).repeat(40, 1), None)
    assert sum(sizes) == 900
    assert max(sizes) * 40 <= 2**12


def test_bounds_of_another_pass_are_not_used() -> None:
    points, centroids = ArrayPoints(noise(500, 8, 0)), noise(20, 8, 1)
    first = check(points, centroids, None)
    check(points, moved(centroids, 1.0, 2), None)
    check(points, moved(centroids, 1.0, 3), first)


def test_a_pass_that_fails_leaves_no_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = ArrayPoints(noise(500, 8, 0)), noise(20, 8, 1)
    before = check(points, centroids, None)
    with monkeypatch.context() as patch:
        patch.setattr(ClusterSums, "move", lambda *_: 1 / 0)  # after the search
        with pytest.raises(ZeroDivisionError):
            points.assign_to(moved(centroids, 1.0, 2), before, distances=False)
    check(points, centroids, before)


@pytest.mark.parametrize("options", [
    {"spherical": True},
    {"empty": "relocate"},
    {"tol": 1e-4},
    {"fixed": noise(5, 24, 9).numpy()},
    {"weights": np.arange(3000) % 3},
    {"init": noise(1, 24, 8).repeat(40, 1).numpy()},  # all but one are empty at first
])  # fmt: skip
def test_kmeans_has_the_same_bits_as_without(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    rows = noise(3000, 24, 0).numpy() + 2 * noise(30, 24, 1).repeat(100, 1).numpy()
    bounded = kmeans(rows, 40, **options)  # type: ignore[arg-type]
    monkeypatch.setattr("deepclust.clustering.array_points.may_keep", lambda *_: False)
    plain = kmeans(rows, 40, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(bounded.centroids, plain.centroids)
    np.testing.assert_array_equal(bounded.assignments, plain.assignments)
    assert bounded.history == plain.history


def test_any_number_of_threads_gives_the_same_bits() -> None:
    rows, starts = noise(20_000, 12, 0), noise(30, 12, 1)
    found = [kmeans(ArrayPoints(rows, threads=threads), 30, init=starts) for threads in (1, 2, 3)]
    for other in found[1:]:
        np.testing.assert_array_equal(other.centroids, found[0].centroids)
        np.testing.assert_array_equal(other.assignments, found[0].assignments)


def test_rows_whose_distances_overflow_end_the_pass_like_before() -> None:
    rows, centroids = noise(50, 4, 0), noise(6, 4, 1)
    rows[3] = 3e38
    points = ArrayPoints(rows)
    first = points.assign_to(centroids, None, distances=False)
    second = points.assign_to(centroids + 0.1, first, distances=False)
    assert first.cluster_ids[3] == second.cluster_ids[3] == 0


@pytest.mark.parametrize("scale", [1e-17, 1e-19, 1e-20, 3e-21, 1e-21, 1e-22])
def test_numbers_whose_squares_float32_hardly_holds_find_the_smallest_distances(
    scale: float,
) -> None:
    points, centroids, before = ArrayPoints(noise(900, 16, 0) * scale), noise(20, 16, 1), None
    for step in range(3):
        before = check(points, centroids * scale, before)
        centroids = moved(centroids, 0.2, step)


def test_faint_columns_beside_a_constant_one_give_the_same_bits_as_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.concatenate([np.ones((3000, 17)), 1e-21 * noise(3000, 16, 0).numpy()], 1)
    bounded = kmeans(rows.astype(np.float32), 20, iterations=15)
    monkeypatch.setattr("deepclust.clustering.array_points.may_keep", lambda *_: False)
    plain = kmeans(rows.astype(np.float32), 20, iterations=15)
    np.testing.assert_array_equal(bounded.assignments, plain.assignments)


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        ([[1.8e19], [0]], ([[1], [-1]], [[0], [2.7e19]])),  # the far score is not a number
        ([[1.5e19], [0]], ([[1], [-1], [0]], [[2.4e19], [1e19], [0]])),  # it is infinite
    ],
)
def test_rows_whose_scores_overflow_find_the_smallest_distances(
    rows: list[list[float]], passes: tuple[list[list[float]], ...]
) -> None:
    points, before = ArrayPoints(torch.tensor(rows)), None
    for centroids in passes:
        before = check(points, torch.tensor(centroids, dtype=torch.float32), before)


def test_rows_that_are_too_long_are_the_same_error_as_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(1).standard_normal((3000, 8)).astype(np.float32)
    rows[::100, 0] *= np.float32(1e19)
    for keep in (array_points.may_keep, lambda *_: False):
        monkeypatch.setattr(array_points, "may_keep", keep)
        with pytest.raises(NumericalError):
            kmeans(rows, 20, iterations=15, empty="relocate")
