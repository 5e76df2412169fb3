"""Points over 1, 2 and 3 ranks: the same centroids and assignments, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.errors import DataError, NumericalError
from deepclust.world import World
from tests.ranks import on_ranks


def rows(n: int = 1500, dim: int = 24, dtype: str = "float32") -> np.ndarray:
    draws = np.random.default_rng(0)
    centres = 2 * draws.standard_normal((12, dim))
    return (centres[draws.integers(0, 12, n)] + draws.standard_normal((n, dim))).astype(dtype)


def shard(world: World, x: np.ndarray, **options: Any) -> ShardedPoints:
    """Our part of x: the first rank has most, to be unlike the others."""
    cuts = np.linspace(0, len(x), world.size + 1).astype(int)
    cuts[1:-1] += len(x) // 5
    return ShardedPoints(ArrayPoints(x[cuts[world.rank] : cuts[world.rank + 1]], **options), world)


def cluster(world: World, x: np.ndarray, options: dict[str, Any]) -> KMeansResult:
    return kmeans(shard(world, x), **options)


def cluster_weighted(
    world: World, x: np.ndarray, weights: np.ndarray, options: dict[str, Any]
) -> KMeansResult:
    cuts = np.linspace(0, len(x), world.size + 1).astype(int)
    own = slice(cuts[world.rank], cuts[world.rank + 1])
    return kmeans(ShardedPoints(ArrayPoints(x[own], weights=weights[own]), world), **options)


def together(results: list[KMeansResult]) -> np.ndarray:
    return np.concatenate([one.assignments for one in results])


def assert_same(parts: list[KMeansResult], alone: KMeansResult) -> None:
    for part in parts:
        np.testing.assert_array_equal(part.centroids, alone.centroids)
        np.testing.assert_array_equal(part.forced, alone.forced)
        assert part.history == alone.history
        assert part.inertia == alone.inertia
    np.testing.assert_array_equal(together(parts), alone.assignments)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("options", [
    {"k": 20, "init": "random"}, {"k": 20, "init": "k-means++", "spherical": True},
    {"k": 300, "empty": "relocate"}, {"k": 10, "min_size": 60},
], ids=["random", "spherical", "many", "min_size"])  # fmt: skip
def test_every_number_of_ranks_gives_the_bits_of_one(
    size: int, dtype: str, options: dict[str, Any]
) -> None:
    x = rows(dtype=dtype)
    assert_same(on_ranks(size, cluster, x, options), kmeans(x, **options))


def test_fixed_centroids_and_repairs_of_empties_agree_too() -> None:
    x = np.concatenate([rows(200, 6).repeat(6, 0), rows(60, 6)])
    start = rows(177, 6)[:1].repeat(177, 0)  # all in one place
    options = {"k": 180, "fixed": 9 + rows(3, 6), "init": start, "iterations": 2}
    alone = kmeans(x, **options)
    assert alone.empty_repairs > 0
    assert_same(on_ranks(3, cluster, x, options), alone)


@pytest.mark.parametrize(
    "options",
    [{"k": 9}, {"k": 30, "init": "k-means++"}, {"k": 200, "min_size": 2, "iterations": 3}],
    ids=["random", "plus-plus", "repairs"],
)
def test_weights_are_drawn_and_summed_on_every_number_of_ranks_as_on_one(
    options: dict[str, Any],
) -> None:
    x, weights = rows(), np.random.default_rng(1).uniform(0, 3, 1500)
    weights[:500] = 0  # all rows of the first rank
    alone = kmeans(x, weights=weights, **options)
    assert_same(on_ranks(3, cluster_weighted, x, weights, options), alone)
    assert np.bincount(alone.assignments[500:], minlength=options["k"]).min() > 0


def test_a_rank_without_rows_takes_part() -> None:
    x = rows(30)
    parts = on_ranks(3, cluster, x[:2], {"k": 2})  # the shards are 0, 0 and 2 or so
    assert_same(parts, kmeans(x[:2], 2))


def bad_rows(world: World, x: np.ndarray) -> str:
    with pytest.raises(NumericalError) as caught:
        kmeans(shard(world, x), 3)
    return str(caught.value)


def test_rows_that_are_not_finite_are_named_by_id_on_every_rank() -> None:
    x = rows()
    x[[3, 1400], 0] = np.nan
    messages = on_ranks(3, bad_rows, x)
    assert len(set(messages)) == 1
    assert "2 of 1500 feature rows are not finite: row 3, 1400" in messages[0]


def too_many(world: World, x: np.ndarray) -> str:
    with pytest.raises(DataError) as caught:
        kmeans(shard(world, x), 90)
    return str(caught.value)


def test_too_few_distinct_rows_are_counted_over_all_ranks() -> None:
    messages = on_ranks(2, too_many, rows(50, 4).repeat(4, 0))
    assert all("only 50" in message for message in messages)


def sent(world: World, x: np.ndarray) -> list[tuple[int, ...]]:
    """The shapes that one iteration sends."""
    points, shapes = shard(world, x), []
    before = points.assign_to(torch.from_numpy(x[:7].copy()), distances=False)
    whole = type(world).all_reduce

    def spy(self: World, tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return whole(self, tensor)

    World.all_reduce = spy  # type: ignore[method-assign]
    try:
        points.assign_to(torch.from_numpy(x[1:8].copy()), before, distances=False)
    finally:
        World.all_reduce = whole  # type: ignore[method-assign]
    return shapes


def test_an_iteration_sends_sums_and_counts_and_never_rows() -> None:
    assert on_ranks(2, sent, rows(dim=5))[0] == [(2, 7, 5), (1, 7), (7,)]


def second_level(world: World, x: np.ndarray, ids: np.ndarray) -> KMeansResult:
    return kmeans(shard(world, x).select(ids), 5)


def test_a_view_of_some_rows_is_sharded_as_they_are() -> None:
    x = rows()
    ids = np.flatnonzero(x[:, 0] > 0)
    assert_same(on_ranks(3, second_level, x, ids), kmeans(x[ids], 5))
