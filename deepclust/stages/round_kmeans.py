"""One round's k-means of all samples: flat or in two levels, seeded or not, by any number of ranks.

Flat k-means runs on sharded points, each rank with its part of the rows. In two levels every rank
reads all rows (a memory-mapped file), see `hierarchy.py`. Both come back as a `Partition` of all n
samples, and both take prototypes as pinned centroids or as a start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64

from deepclust.clustering import class_prototypes
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.points import Points
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.clustering.two_level import TwoLevel, start_of, two_level
from deepclust.recipe.sections import ClusterSection
from deepclust.seeds.round import SeededRound
from deepclust.world import World


@dataclass(frozen=True)
class Task:
    """What is clustered, how, and who does it."""

    rows: Float[np.ndarray, "n d"]  # whitened, memory-mapped
    valid: Int64[np.ndarray, " m"]  # sample ids that are not excluded, ascending
    config: ClusterSection
    two_level: bool
    seeds: SeededRound | None
    seed: int
    device: torch.device
    world: World

    @property
    def options(self) -> dict[str, Any]:
        """What every k-means of it takes."""
        config = self.config
        return {"iterations": config.iterations, "empty": config.empty, "backend": config.backend}


@dataclass(frozen=True)
class Partition:
    """The clusters of all n samples."""

    labels: Int32[np.ndarray, " n"]  # -1 = excluded
    distances: Float32[np.ndarray, " n"]  # squared, to the own centroid; NaN = excluded
    centroids: Float32[np.ndarray, "k d"]
    inertia: float
    empty_fixed: Int64[np.ndarray, " e"]  # pinned clusters that won nothing
    claimed: Int64[np.ndarray, " c"]  # labelled samples that their class's cluster took
    facts: dict[str, Any]  # for the statistics
    read_s: float = 0.0  # until the rows were on the device; on a CPU the first pass reads them
    levels: TwoLevel | None = None

    def first_level(self) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, "s d"]]:
        """The clusters that seeds can pin, and their centroids: super-clusters where there are."""
        if self.levels is None:
            return self.labels, self.centroids
        supers = np.full_like(self.labels, -1)
        supers[self.labels >= 0] = self.levels.supers
        return supers, self.levels.super_centroids


def partition(task: Task) -> Partition:
    """Cluster, and let labelled samples take their class's cluster if they shall.

    Called by all ranks of `task.world`, which all get the whole result. Raises what `kmeans` and
    `two_level` raise.
    """
    started = time.monotonic()
    if task.two_level:
        whole = ArrayPoints(task.rows, device=task.device).select(task.valid)
        read = time.monotonic()
        found = _in_two_levels(task, whole)
    else:
        points = _points(task, _part(task))
        read = time.monotonic()
        found = _flat(task, points)
    return replace(found, read_s=read - started)


def refined(task: Task) -> SeededRound | None:
    """The task's seeds, their prototypes refined by all rows if they shall be; see `prototypes`."""
    seeds = task.seeds
    if seeds is None or seeds.config.refine == 0:
        return seeds
    points = _points(task, _part(task))
    better = class_prototypes.refined(points, seeds.prototypes, seeds.config.refine)
    return replace(seeds, prototypes=better)


def _part(task: Task) -> Int64[np.ndarray, " o"]:
    """The valid rows that this rank holds when all cluster together."""
    part: Int64[np.ndarray, " o"] = np.array_split(task.valid, task.world.size)[task.world.rank]
    return part


def _flat(task: Task, points: ArrayPoints | ShardedPoints) -> Partition:
    own = _part(task)
    result = _kmeans(task, points)
    labels, distances = _spread(result, own, len(task.rows), task.world)
    found = Partition(
        labels, distances, result.centroids, result.inertia, result.empty_fixed,
        claimed=np.zeros(0, np.int64),
        facts={
            "forced": len(result.forced), "empty_repairs": result.empty_repairs,
            "iterations": len(result.history),
        },
    )  # fmt: skip
    if task.seeds is None or not task.seeds.config.forces:
        return found
    return _claimed(found, task.rows, task.seeds)


def _kmeans(task: Task, points: ArrayPoints | ShardedPoints) -> KMeansResult:
    """k-means of the valid rows, of which this rank may hold a part."""
    config, world = task.config, task.world
    mine = points.local if isinstance(points, ShardedPoints) else points
    if task.seeds is not None:
        options = _seeded_start(task, points, config.k)
    else:
        options = {"init": world.broadcast_object(_start(task, mine) if world.is_first else "")}
    return kmeans(
        points, config.k, seed=task.seed, min_size=config.min_size, **options, **task.options
    )


def _points(task: Task, own: Int64[np.ndarray, " o"]) -> ArrayPoints | ShardedPoints:
    """The valid rows, of which `own` are on this rank's device."""
    stretch = task.rows[own[0] : own[-1] + 1] if len(own) else task.rows[:0]
    mine = ArrayPoints(stretch, device=task.device)
    if len(own) < len(stretch):
        mine = mine.select(own - own[0])
    return mine if task.world.size == 1 else ShardedPoints(mine, task.world)


def _start(task: Task, mine: ArrayPoints) -> str | np.ndarray:
    """What an unseeded k-means starts from; "two-level" looks at rows of all ranks."""
    config = task.config
    alone = task.world.size == 1 or config.init != "two-level"
    whole = mine if alone else ArrayPoints(task.rows).select(task.valid)
    return start_of(whole, config.init, config.k, task.seed)


def _seeded_start(task: Task, points: Points, k: int) -> dict[str, Any]:
    """Prototypes pinned among k centroids, or, once released, where those start."""
    assert task.seeds is not None
    found, init = task.seeds.prototypes, task.config.init
    if task.seeds.pinned:
        return {"fixed": found.rows, "init": init, "spherical": True}
    return {
        "init": class_prototypes.start_from(points, found, k, init, task.seed),
        "spherical": True,
    }


def _spread(
    result: KMeansResult, own: Int64[np.ndarray, " o"], n: int, world: World
) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """This rank's labels and distances at their ids, and those of all others added."""
    labels = np.zeros(n, np.int32)
    distances = np.zeros(n, np.float32)
    labels[own] = result.assignments + 1
    distances[own] = result.distances
    both = (
        world.all_reduce(torch.from_numpy(x).to(world.device)).cpu() for x in (labels, distances)
    )
    labels, distances = (x.numpy() for x in both)
    distances[labels == 0] = np.nan
    return labels - 1, distances


def _claimed(found: Partition, rows: np.ndarray, seeds: SeededRound) -> Partition:
    """Labelled samples in the nearest cluster of their class, whatever k-means has said."""
    ids = seeds.table.ids
    targets, distances = seeds.claim(rows, found.centroids)
    moved = targets != found.labels[ids]
    ids, targets, distances = ids[moved], targets[moved], distances[moved]
    change = distances.sum(dtype=np.float64) - found.distances[ids].sum(dtype=np.float64)
    found.labels[ids], found.distances[ids] = targets, distances
    return replace(found, inertia=found.inertia + float(change), claimed=ids)


def _in_two_levels(task: Task, points: ArrayPoints) -> Partition:
    config, rows, valid, seeds = task.config, task.rows, task.valid, task.seeds
    options = task.options
    if seeds is not None:
        options |= _seeded_start(task, points, config.supers)
        if seeds.config.forces:
            places = np.searchsorted(valid, seeds.table.ids)
            options["claim"] = lambda centroids: (places, seeds.claim(rows, centroids)[0])
    found = two_level(points, config.supers, config.k, seed=task.seed, world=task.world, **options)
    labels = np.full(len(rows), -1, np.int32)
    distances = np.full(len(rows), np.nan, np.float32)
    labels[valid], distances[valid] = found.assignments, found.distances
    return Partition(
        labels, distances, found.centroids, found.inertia, found.empty_fixed,
        claimed=valid[found.claimed],
        facts={
            "forced": len(found.forced), "empty_repairs": found.empty_repairs,
            "iterations": found.iterations, "level_seconds": list(found.seconds),
            "super_sizes": np.bincount(found.supers, minlength=config.supers).tolist(),
        },
        levels=found,
    )  # fmt: skip
