"""Two levels: each row in the nearest sub-cluster of its super-cluster, on any number of ranks."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.options import Given, KMeansOptions, Progress
from deepclust.clustering.two_level import TwoLevel, count_distinct, kmeans_up_to, two_level
from deepclust.clustering.two_level_init import two_level_start
from deepclust.errors import DataError, RecipeError
from deepclust.world import World
from tests.clustering.test_sharded_points import rows
from tests.ranks import on_ranks


def test_every_row_is_in_the_nearest_sub_cluster_of_its_super_cluster() -> None:
    x = rows()
    found = two_level(ArrayPoints(x), 4, KMeansOptions(40, 10))
    table = ((x.astype(np.float64)[:, None] - found.centroids) ** 2).sum(2)
    other = found.supers[:, None] != np.arange(40) // 10
    nearest = np.where(other, np.inf, table).argmin(1)
    free = np.setdiff1d(np.arange(len(x)), found.forced)
    np.testing.assert_array_equal(found.assignments[free], nearest[free])
    np.testing.assert_array_equal(found.assignments // 10, found.supers)
    assert found.inertia == pytest.approx(table[np.arange(len(x)), found.assignments].sum())


def test_no_sub_cluster_is_empty_even_where_super_clusters_are_small() -> None:
    x = np.concatenate([rows(600), 50 + rows(12)])  # 12 rows far away would be a super-cluster
    found = two_level(ArrayPoints(x), 3, KMeansOptions(90, 10))
    assert np.bincount(found.assignments, minlength=90).min() >= 1
    assert np.bincount(found.supers, minlength=3).min() >= 30


def test_one_super_cluster_is_flat_k_means() -> None:
    found = two_level(ArrayPoints(rows(400)), 1, KMeansOptions(8, 10))
    assert np.bincount(found.supers).tolist() == [400]
    assert len(np.unique(found.assignments)) == 8


def split(world: World, x: np.ndarray, supers: int = 5) -> TwoLevel:
    return two_level(ArrayPoints(x), supers, KMeansOptions(50, 10), world=world)


@pytest.mark.parametrize(("size", "supers"), [(2, 5), (3, 5), (2, 1), (3, 2)])
def test_any_number_of_ranks_gives_the_same_two_levels(size: int, supers: int) -> None:
    x = rows()
    alone = asdict(split(World(), x, supers))
    for part in on_ranks(size, split, x, supers):
        for name, value in asdict(part).items():
            if name != "seconds":
                np.testing.assert_array_equal(value, alone[name], err_msg=name)


def test_bad_numbers_and_too_few_distinct_rows_are_named() -> None:
    with pytest.raises(RecipeError, match=r"cluster.supers=3 must divide cluster.k=10"):
        two_level(ArrayPoints(rows(100)), 3, KMeansOptions(10, 10))
    with pytest.raises(DataError, match=r"super-cluster \d: .* distinct"):
        two_level(ArrayPoints(rows(20).repeat(10, 0)), 2, KMeansOptions(40, 10))


def test_a_two_level_start_and_three_passes_come_close_to_twenty_passes() -> None:
    x = rows(6000)
    start = two_level_start(ArrayPoints(x), 100)
    few = kmeans(x, 100, iterations=3, init=start).inertia
    assert few < 1.01 * kmeans(x, 100, iterations=20).inertia
    np.testing.assert_array_equal(start, two_level_start(ArrayPoints(x), 100))


def test_a_two_level_start_survives_few_distinct_rows_among_many() -> None:
    x = np.concatenate([np.ones((5000, 24), np.float32), rows(20)])
    assert len(np.unique(two_level_start(ArrayPoints(x), 16), axis=0)) == 16


def failing(world: World, x: np.ndarray) -> str:
    with pytest.raises(DataError) as caught:
        two_level(ArrayPoints(x), 2, KMeansOptions(40, 10), world=world)
    return str(caught.value)


def test_a_super_cluster_that_cannot_be_split_is_an_error_on_every_rank() -> None:
    x = np.concatenate([rows(100), 90 + rows(4).repeat(25, 0)])
    messages = on_ranks(2, failing, x)
    assert any("distinct" in message for message in messages)
    assert any("another rank" in message for message in messages)


def test_a_two_level_start_survives_heavy_duplicates() -> None:
    x = np.concatenate([rows(40).repeat(50, 0), rows(300)])
    start = two_level_start(ArrayPoints(x), 120)
    assert len(np.unique(start, axis=0)) == 120
    assert len(kmeans(x, 120, iterations=2, init=start).forced) <= 120


def unit_rows(n: int = 600) -> np.ndarray:
    x = rows(n).astype(np.float64)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def claim(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0, 3, 6, ... take super-cluster 1."""
    places = np.arange(0, 30, 3)
    return places, np.ones(len(places), np.int32)


def pinned(world: World, x: np.ndarray) -> TwoLevel:
    """Two pinned super-clusters, of which the second is where no row is."""
    away = -x.mean(0) / np.linalg.norm(x.mean(0))
    fixed = np.stack([x[5], away]).astype(np.float32)
    return two_level(
        ArrayPoints(x), 4, KMeansOptions(40, 10, spherical=True), Given(fixed=fixed), claim, world
    )


def test_pinned_super_clusters_stay_and_may_be_small() -> None:
    x = np.abs(unit_rows())
    found = pinned(World(), x)
    assert found.super_centroids[0].tobytes() == x[5].tobytes()
    assert found.empty_fixed.tolist() == [1]
    assert (found.supers[0:30:3] == 1).all()  # claimed, after it had won nothing
    assert found.claimed.tolist() == list(range(0, 30, 3))
    np.testing.assert_array_equal(found.assignments // 10, found.supers)
    sizes = np.bincount(found.assignments, minlength=40).reshape(4, 10)
    np.testing.assert_array_equal((sizes > 0).sum(1), found.subs)
    assert found.subs.tolist() == [10, 10, 10, 10]


def test_a_pinned_super_cluster_has_no_more_sub_clusters_than_distinct_rows() -> None:
    x = np.abs(unit_rows())
    x[0:30:3] = x[[0, 3]].repeat(5, 0)
    found = pinned(World(), x)
    assert found.subs.tolist() == [10, 2, 10, 10]
    assert not found.centroids[12:20].any()
    away = two_level(ArrayPoints(x), 4, KMeansOptions(40, 10, spherical=True), Given(fixed=-x[:1]))
    assert away.subs.tolist() == [0, 10, 10, 10]
    assert np.bincount(away.assignments, minlength=40)[:10].sum() == 0


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same_pinned_levels(size: int) -> None:
    x = np.abs(unit_rows()).astype(np.float16)
    alone = asdict(pinned(World(), x))
    for part in on_ranks(size, pinned, x):
        for name, value in asdict(part).items():
            if name != "seconds":
                np.testing.assert_array_equal(value, alone[name], err_msg=name)


def test_distinct_rows_are_counted_up_to_a_bound() -> None:
    x = rows(50).repeat(60, 0)
    np.random.default_rng(0).shuffle(x)
    assert count_distinct(ArrayPoints(x), 100) == 50
    assert count_distinct(ArrayPoints(x), 7) == 7
    assert len(kmeans_up_to(ArrayPoints(x), KMeansOptions(100)).centroids) == 50
    assert count_distinct(ArrayPoints(x).select(np.zeros(0, np.int64)), 3) == 0


def test_one_cluster_of_one_super_cluster_is_everything() -> None:
    found = two_level(ArrayPoints(rows(100)), 1, KMeansOptions(1, 10))
    assert not found.assignments.any()
    assert found.subs.tolist() == [1]


def test_both_levels_show_their_progress() -> None:
    seen: list[Progress] = []
    options = KMeansOptions(40, iterations=4)
    found = two_level(ArrayPoints(rows()), 4, options, progress=seen.append)
    assert [one.level for one in seen] == [1] * (found.iterations + 1) + [2] * 4
    assert [(one.pass_, one.of) for one in seen[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1].inertia == pytest.approx(found.inertia, rel=1e-6)
