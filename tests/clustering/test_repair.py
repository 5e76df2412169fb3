"""No cluster is empty at the end: duplicates, splits, relocations, minimum sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.repair import draw_donors, fill_empties, relocate, split
from deepclust.errors import DataError
from deepclust.world import generator


def noise(n: int, dim: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def duplicates() -> np.ndarray:
    """5,000 rows of which 90 % are copies of 100 rows: 600 distinct values."""
    copies = noise(100)[np.random.default_rng(1).integers(0, 100, 4500)]
    x = np.concatenate([copies, noise(500, seed=2)])
    return x[np.random.default_rng(3).permutation(len(x))]


def assert_consistent(x: np.ndarray, found: KMeansResult) -> None:
    """Sizes, distances and inertia fit; every point is at its nearest centroid or forced."""
    table = ((x.astype(np.float64)[:, None] - found.centroids.astype(np.float64)) ** 2).sum(2)
    own = table[np.arange(len(x)), found.assignments]
    np.testing.assert_allclose(found.distances, own, rtol=1e-5, atol=1e-6)
    assert found.inertia == pytest.approx(own.sum(), rel=1e-6, abs=1e-6)
    free = np.setdiff1d(np.arange(len(x)), found.forced)
    np.testing.assert_allclose(own[free], table[free].min(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("empty", ["split", "relocate"])
@pytest.mark.parametrize("k", [150, 590, 600])
def test_heavy_duplicates_end_without_an_empty_cluster(k: int, empty: str) -> None:
    x = duplicates()
    found = kmeans(x, k, iterations=5, empty=empty)
    assert np.bincount(found.assignments, minlength=k).min() >= 1
    assert_consistent(x, found)


def test_one_cluster_more_than_distinct_rows_is_an_error() -> None:
    x = duplicates()
    with pytest.raises(DataError, match=r"601 distinct .* only 600"):
        kmeans(x, 601)
    with pytest.raises(DataError, match="only 600"):
        kmeans(x, 601, init=np.zeros((601, 4), np.float32), iterations=2)


@pytest.mark.parametrize("empty", ["split", "relocate"])
def test_a_start_of_equal_centroids_still_fills_all(empty: str) -> None:
    x = noise(2000)
    for iterations in (0, 1, 5):
        found = kmeans(x, 50, iterations, init=np.zeros((50, 4), np.float32), empty=empty)
        assert np.bincount(found.assignments, minlength=50).min() >= 1
        assert_consistent(x, found)


def test_the_final_repair_says_what_it_moved() -> None:
    x = noise(300)
    found = kmeans(x, 4, iterations=0, init=np.zeros((4, 4), np.float32))
    assert found.empty_repairs == 3
    assert len(found.forced) == 3
    np.testing.assert_array_equal(np.sort(found.distances)[:3], 0)
    np.testing.assert_array_equal(x[found.forced], found.centroids[found.assignments[found.forced]])


def test_history_names_donors_that_differ() -> None:
    start = np.concatenate([noise(10), np.full((5, 4), 1e3, np.float32)])
    for empty in ("split", "relocate"):
        first = kmeans(noise(1000), 15, iterations=2, init=start, empty=empty).history[0]
        assert first.empties == 5
        assert len(set(first.donors)) == len(first.donors) == 5
        assert max(first.donors) < 10


def test_donors_are_drawn_by_size_without_repetition_and_never_emptied() -> None:
    draws = generator(0, "test")
    sizes = np.array([1, 0, 1000, 2, 1000, 1])
    assert sorted(draw_donors(sizes, 9, draws)) == [2, 3, 4]
    assert len(draw_donors(np.array([1, 1, 0]), 1, draws)) == 0
    picks = [int(draw_donors(sizes, 1, draws)[0]) for _ in range(300)]
    assert set(picks) <= {2, 3, 4}
    assert 100 < picks.count(2) < 200


def test_split_moves_twins_apart_and_leaves_fixed_rows_alone() -> None:
    x = np.concatenate([noise(90) + 50, noise(10) - 50])
    points = ArrayPoints(x)
    centroids = torch.tensor([[50.0] * 4, [-50.0] * 4, [1e4] * 4])
    found = points.assign_to(centroids)
    before = centroids.clone()
    donors = split(points, centroids, found, np.array([2]), 1, generator(0, "test"))
    assert donors.tolist() == [1]
    torch.testing.assert_close(centroids[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close((centroids[1] + centroids[2]) / 2, before[1])
    assert not torch.equal(centroids[1], centroids[2])


def test_relocate_takes_the_farthest_point_of_its_donor() -> None:
    x = noise(100)
    x[37] *= 100
    points = ArrayPoints(x)
    centroids = torch.tensor([[0.0] * 4, [1e5] * 4])
    found = points.assign_to(centroids)
    assert relocate(points, centroids, found, np.array([1]), 0, generator(0, "t")).tolist() == [0]
    np.testing.assert_array_equal(centroids[1].numpy(), x[37])


def test_fill_empties_never_touches_a_fixed_centroid() -> None:
    points = ArrayPoints(noise(50))
    centroids = torch.full((5, 4), 1e4)
    done = fill_empties(points, centroids, points.assign_to(centroids), 2)
    torch.testing.assert_close(done.centroids[:2], centroids[:2], rtol=0, atol=0)
    assert (done.assignment.counts[2:] > 0).all()


@pytest.mark.parametrize("min_size", [2, 10, 25])
def test_minimum_size_holds_and_donors_keep_it_too(min_size: int) -> None:
    x = np.concatenate([noise(900) * 0.01, noise(100) * 10])
    found = kmeans(x, 40, min_size=min_size)
    assert np.bincount(found.assignments, minlength=40).min() >= min_size
    assert_consistent(x, found)


def test_minimum_size_times_k_may_be_all_points_and_not_more() -> None:
    x = noise(60)
    assert (np.bincount(kmeans(x, 6, min_size=10).assignments) == 10).all()
    with pytest.raises(DataError, match=r"6 clusters of at least 11 points need 66 .* only 60"):
        kmeans(x, 6, min_size=11)


def test_spherical_repair_keeps_unit_norm() -> None:
    x = noise(500)
    start = np.ones((20, 4), np.float32)
    found = kmeans(x, 20, iterations=0, init=start, spherical=True)
    assert np.bincount(found.assignments, minlength=20).min() >= 1
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert_consistent(unit, found)
