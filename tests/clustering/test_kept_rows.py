"""Rows packed once and kept: the same clusters as without, read only where a pass needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust import kmeans
from deepclust.clustering import kept_rows, nearest
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kept_rows import may_keep
from deepclust.clustering.nearest import Nearest
from tests.clustering.test_nearest import noise, reference


@pytest.fixture(autouse=True)
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess in bfloat16 on any CPU."""
    monkeypatch.setattr(nearest, "half_is_faster", lambda: True)


@given(
    n=st.integers(1, 300), dim=st.integers(1, 40), k=st.integers(1, 50), seed=st.integers(0, 99),
    away=st.sampled_from([0.0, 0.1, 3.0, 1e4]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_an_origin_anywhere_finds_the_same_centroids(
    n: int, dim: int, k: int, seed: int, away: float
) -> None:
    rows, centroids = noise(n, dim, seed), noise(k, dim, seed + 1)
    origin = away * noise(1, dim, seed + 2)[0]
    found = Nearest(centroids, True, origin)(rows)
    torch.testing.assert_close(found, reference(rows, centroids))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_kept_rows_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, spherical: bool, weighted: bool
) -> None:
    rows = noise(3000, 24, 0).numpy()
    weights = np.arange(3000) % 3 if weighted else None
    options = {"iterations": 6, "spherical": spherical, "weights": weights}
    kept = kmeans(rows, 40, **options)
    monkeypatch.setattr("deepclust.clustering.array_points.may_keep", lambda *_: False)
    plain = kmeans(rows, 40, **options)
    np.testing.assert_array_equal(kept.centroids, plain.centroids)
    np.testing.assert_array_equal(kept.assignments, plain.assignments)
    assert kept.history == plain.history


def test_later_passes_read_few_rows_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centres = 9 * noise(8, 24, 0)
    np.save(tmp_path / "rows.npy", (centres.repeat(500, 1).reshape(-1, 24) + noise(4000, 24, 1)))
    points = ArrayPoints(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    before = points.assign_to(centres, distances=False)
    read: list[int] = []
    at = points._at
    monkeypatch.setattr(points, "_at", lambda where: (rows := at(where), read.append(len(rows)))[0])
    points.assign_to(centres + 0.01, before, distances=False)
    assert sum(read) < 400


def test_another_view_of_the_rows_does_not_use_them() -> None:
    points = ArrayPoints(noise(100, 8, 0))
    points.assign_to(noise(5, 8, 1))
    assert points.kept is not None
    assert points.configure(spherical=True, backend="torch").kept is None
    assert points.select(np.arange(9)).kept is None


def test_more_than_memory_allows_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_keep(1000, 520, 0)
    assert not may_keep(10**7, 520, 0)  # of a file: 5 GB
    assert may_keep(10**6, 1040, 10**6 * 1050)  # of rows that take more themselves
    monkeypatch.setattr(kept_rows, "free_memory", lambda: 1e6)
    assert not may_keep(1000, 520, 0)
