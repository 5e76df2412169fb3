"""One round's k-means of all samples: flat or in two levels, seeded or not, on any number of ranks.

Flat k-means runs on sharded points, each rank with its part of the rows. In two levels every rank
reads all rows (a memory-mapped file), see `two_level.py`. Both return the `RoundClusters` of all n
samples, and both use prototypes as pinned centroids or as a start. A round with several heads
clusters the same rows once for each, from different seeds. Where samples have several rows (a
bank), flat head h clusters the rows of part h modulo their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering import class_prototypes
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import solve_kmeans
from deepclust.clustering.options import Given, KMeansOptions, OnProgress, Progress
from deepclust.clustering.points import Points
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.clustering.two_level import TwoLevel, two_level
from deepclust.clustering.two_level_init import given_start
from deepclust.recipe.declare import Refresh
from deepclust.recipe.sections import ClusterSection
from deepclust.run.reporting import Report
from deepclust.seeds.round import SeededRound
from deepclust.world import World


@dataclass(frozen=True)
class RoundTask:
    """What is clustered, how, and by which ranks."""

    rows: Float[np.ndarray, "n d"]  # features, memory-mapped
    valid: Int64[np.ndarray, " m"]  # sample ids that are not excluded, ascending
    config: ClusterSection
    refresh: Refresh
    seeds: SeededRound | None
    random_seeds: tuple[int, ...]  # one for each head
    device: torch.device
    world: World
    report: Report
    progress: Callable[[int, Progress], None]  # called with the head, from 0
    others: tuple[Float[np.ndarray, "n d"], ...] = ()  # further rows of the samples, of a bank
    scorer: dict[str, Tensor] | None = None  # what gives scores of rows, of a sinkhorn round

    def options(self, head: int) -> KMeansOptions:
        """Return the settings of a head's k-means."""
        config = self.config
        return KMeansOptions(
            config.k,
            config.iterations,
            self.random_seeds[head],
            init=config.init,
            empty=config.empty,
            spherical=self.refresh.spherical or self.seeds is not None,
            min_size=config.min_size,
            backend=config.backend,
        )

    def on_progress(self, head: int) -> OnProgress:
        """Return what is called after each pass of a head's k-means."""
        return lambda progress: self.progress(head, progress)


@dataclass(frozen=True)
class RoundClusters:
    """The clusters of all n samples, of one head."""

    assignments: Int32[np.ndarray, " n"]  # -1 = excluded
    distances: Float32[np.ndarray, " n"]  # squared, to the sample's centroid; NaN = excluded
    centroids: Float32[np.ndarray, "k d"]
    inertia: float
    empty_fixed: Int64[np.ndarray, " e"]  # pinned clusters that won nothing
    claimed: Int64[np.ndarray, " c"]  # labelled samples moved to a cluster of their class
    facts: dict[str, Any]  # for the statistics
    levels: TwoLevel | None = None
    repaired: Int64[np.ndarray, " r"] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Samples that a repair gave to a cluster that is not their nearest."""
    rule: dict[str, np.ndarray] = field(default_factory=dict)
    """What else tells the cluster of a row: "weight", "bias" and "scalings" of a sinkhorn round."""

    @property
    def moved(self) -> Int64[np.ndarray, " m"]:
        """Samples that are not where their row alone would put them."""
        return np.union1d(self.repaired, self.claimed)

    def first_level(self) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, "s d"]]:
        """Return the clusters that seeds can pin, super-clusters if any, and their centroids."""
        if self.levels is None:
            return self.assignments, self.centroids
        supers = np.full_like(self.assignments, -1)
        supers[self.assignments >= 0] = self.levels.supers
        return supers, self.levels.super_centroids


def cluster_round(task: RoundTask) -> tuple[list[RoundClusters], float]:
    """Cluster once for each head, and return the clusters, and the seconds spent on reading rows.

    Labelled samples are moved to their class's cluster where the seeds force them. On a CPU the
    first pass reads the rows, so that the seconds are few. Called by all ranks of `task.world`,
    which all return the same. Raises what `kmeans` and `two_level` raise.
    """
    started = time.monotonic()
    heads = range(len(task.random_seeds))
    if task.refresh.levels == 2:
        whole = ArrayPoints(task.rows, device=task.device, alive=task.report.alive)
        whole = whole.select(task.valid).move_in()
        _tell(task, whole.note())
        read_s = time.monotonic() - started
        return [_cluster_two_levels(task, whole, head) for head in heads], read_s
    clusters: dict[int, RoundClusters] = {}
    parts, read_s = (task.rows, *task.others), 0.0
    for part, rows in enumerate(parts[: len(heads)]):
        started, part_task = time.monotonic(), replace(task, rows=rows)
        points = _points(part_task)
        read_s += time.monotonic() - started
        for head in heads[part :: len(parts)]:
            clusters[head] = _cluster_flat(part_task, points, head)
    return [clusters[head] for head in heads], read_s


def refine_seeds(task: RoundTask) -> SeededRound | None:
    """Return the task's seeds, their prototypes refined by all rows if `seeds.refine` is set."""
    seeds = task.seeds
    if seeds is None or seeds.config.refine == 0:
        return seeds
    better = class_prototypes.refine(_points(task), seeds.prototypes, seeds.config.refine)
    return replace(seeds, prototypes=better)


def _part(task: RoundTask) -> Int64[np.ndarray, " o"]:
    """Return the valid rows of this rank when all cluster together."""
    part: Int64[np.ndarray, " o"] = np.array_split(task.valid, task.world.size)[task.world.rank]
    return part


def _points(task: RoundTask) -> ArrayPoints | ShardedPoints:
    """Return the valid rows, of which this rank's part is on its device."""
    own = _part(task)
    stretch = task.rows[own[0] : own[-1] + 1] if len(own) else task.rows[:0]
    mine = ArrayPoints(stretch, device=task.device, alive=task.report.alive)
    if len(own) < len(stretch):
        mine = mine.select(own - own[0])
    _tell(task, mine.move_in().note())
    return mine if task.world.size == 1 else ShardedPoints(mine, task.world)


def _tell(task: RoundTask, note: str | None) -> None:
    """Report what a rank should know of its rows, once for all ranks."""
    if note is not None and task.world.is_first:
        task.report.event("warning", text=note)


def _cluster_flat(task: RoundTask, points: ArrayPoints | ShardedPoints, head: int) -> RoundClusters:
    options, given = task.options(head), _given(task, points, head)
    result = solve_kmeans(points, options, given, task.on_progress(head))
    own = _part(task)
    assignments, distances = spread(
        result.assignments, result.distances, own, len(task.rows), task.world
    )
    clusters = RoundClusters(
        assignments,
        distances,
        result.centroids,
        result.inertia,
        result.empty_fixed,
        claimed=np.zeros(0, np.int64),
        facts={
            "forced": len(result.forced),
            "empty_repairs": result.empty_repairs,
            "iterations": len(result.history),
        },
        repaired=task.valid[result.forced],
    )
    if task.seeds is None or not task.seeds.config.forces:
        return clusters
    return _claim(clusters, task.rows, task.seeds)


def _given(task: RoundTask, points: ArrayPoints | ShardedPoints, head: int) -> Given:
    """Return the centroids that flat k-means starts from, or keeps."""
    options = task.options(head)
    if task.seeds is not None:
        return _seeded_start(task.seeds, points, options)
    if options.init != "two-level":
        return Given()
    # it looks at rows of all ranks, and is computed once for all, on the first one's device
    given = Given()
    if task.world.is_first:
        whole = points.local if isinstance(points, ShardedPoints) else points
        if task.world.size > 1:
            whole = ArrayPoints(task.rows, device=task.device, alive=task.report.alive)
            whole = whole.select(task.valid)
        given = given_start(whole, options)
    task.world.barrier()  # without a time limit, as a start can take long
    return Given(task.world.broadcast_array(cast("np.ndarray | None", given.centroids)))


def _seeded_start(seeds: SeededRound, points: Points, options: KMeansOptions) -> Given:
    """Return prototypes to pin, or, once released, the centroids that begin with them."""
    if seeds.pinned:
        return Given(fixed=seeds.prototypes.rows)
    return Given(class_prototypes.start_from_prototypes(points, seeds.prototypes, options))


def spread(
    cluster_ids: Int32[np.ndarray, " o"],
    costs: Float32[np.ndarray, " o"],
    own: Int64[np.ndarray, " o"],
    n: int,
    world: World,
) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return all ranks' assignments and distances by sample id, from those of a rank's own ids."""
    shifted = np.zeros(n, np.int32)  # by one, so that excluded samples are 0 on every rank
    distances = np.zeros(n, np.float32)
    shifted[own] = cluster_ids + 1
    distances[own] = costs
    both = (
        world.all_reduce(torch.from_numpy(x).to(world.device)).cpu() for x in (shifted, distances)
    )
    shifted, distances = (x.numpy() for x in both)
    distances[shifted == 0] = np.nan
    return shifted - 1, distances


def _claim(clusters: RoundClusters, rows: np.ndarray, seeds: SeededRound) -> RoundClusters:
    """Move labelled samples to the nearest cluster of their class."""
    sample_ids = seeds.table.sample_ids
    targets, distances = seeds.claim(rows, clusters.centroids)
    moved = targets != clusters.assignments[sample_ids]
    sample_ids, targets, distances = sample_ids[moved], targets[moved], distances[moved]
    before = clusters.distances[sample_ids].sum(dtype=np.float64)
    change = float(distances.sum(dtype=np.float64) - before)
    clusters.assignments[sample_ids], clusters.distances[sample_ids] = targets, distances
    return replace(clusters, inertia=clusters.inertia + change, claimed=sample_ids)


def _cluster_two_levels(task: RoundTask, points: ArrayPoints, head: int) -> RoundClusters:
    config, rows, valid, seeds = task.config, task.rows, task.valid, task.seeds
    options, given, claim = task.options(head), Given(), None
    if seeds is not None:
        given = _seeded_start(seeds, points, replace(options, k=config.supers))
        if seeds.config.forces:
            places, force = np.searchsorted(valid, seeds.table.sample_ids), seeds.claim
            claim = lambda centroids: (places, force(rows, centroids)[0])  # noqa: E731
    levels = two_level(
        points, config.supers, options, given, claim, task.world, task.on_progress(head)
    )
    assignments = np.full(len(rows), -1, np.int32)
    distances = np.full(len(rows), np.nan, np.float32)
    assignments[valid], distances[valid] = levels.assignments, levels.distances
    return RoundClusters(
        assignments,
        distances,
        levels.centroids,
        levels.inertia,
        levels.empty_fixed,
        claimed=valid[levels.claimed],
        facts={
            "forced": len(levels.forced),
            "empty_repairs": levels.empty_repairs,
            "iterations": levels.iterations,
            "level_seconds": list(levels.seconds),
            "super_sizes": np.bincount(levels.supers, minlength=config.supers).tolist(),
        },
        levels=levels,
        repaired=valid[levels.forced],
    )
