"""k-means in two levels: m super-clusters, and inside each of them the same number of clusters.

For DeeperCluster (Caron et al., ICCV 2019, section 3.2), whose pseudo-labels are pairs
(super-cluster, sub-cluster).

The clusterings of level two are independent of each other, so ranks share them out, the largest
first. Where there are more ranks than super-clusters, all ranks work on each. Level one runs on
sharded points. Every rank can read all rows (a memory-mapped file), so no rows travel.

The first super-clusters can be pinned (class prototypes, `class_prototypes.py`). A pinned one may
win few rows or none. Then it has a sub-cluster for each of its distinct rows, and its other ids are
empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import KMeansResult, solve_kmeans
from deepclust.clustering.options import (
    NOTHING_GIVEN,
    Given,
    KMeansOptions,
    OnProgress,
    Progress,
)
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.errors import DataError, RecipeError
from deepclust.world import ALONE, World, derive

# Super-centroids [m, d] -> rows (ascending) and the super-clusters that they are moved to
Claim: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class TwoLevel:
    """The centroids and the assignments of both levels.

    Sub-cluster z of super-cluster s has id s * (k / m) + z.
    """

    super_centroids: Float32[np.ndarray, "m d"]
    supers: Int32[np.ndarray, " n"]
    centroids: Float32[np.ndarray, "k d"]  # zeros for an id that is empty
    assignments: Int32[np.ndarray, " n"]  # nearest sub-centroid of the point's super-cluster
    distances: Float32[np.ndarray, " n"]  # squared, to it
    inertia: float
    forced: Int64[np.ndarray, " f"]  # points that a repair gave to a cluster, of either level
    claimed: Int64[np.ndarray, " c"]  # points that `claim` gave to another super-cluster
    subs: Int64[np.ndarray, " m"]  # sub-clusters of each super-cluster: k / m, or fewer
    empty_fixed: Int64[np.ndarray, " e"]  # pinned super-clusters that won nothing
    empty_repairs: int  # empty clusters of either level filled after the last assignment
    iterations: int  # of level one
    seconds: tuple[float, float]  # of the levels


def two_level(
    points: ArrayPoints,
    supers: int,
    options: KMeansOptions,
    given: Given = NOTHING_GIVEN,
    claim: Claim | None = None,
    world: World = ALONE,
    progress: OnProgress | None = None,
) -> TwoLevel:
    """Cluster into `supers` super-clusters and each into options.k / supers sub-clusters.

    `points` are all n rows, on every rank. A super-cluster has k / supers rows or more, unless
    it is pinned. `given`, `init` and `spherical` are for level one. `claim` moves rows to other
    super-clusters before level two, the same on every rank.

    Raises `RecipeError` if `supers` does not divide k, `DataError` if a super-cluster cannot be
    split (without `fixed` and `claim`), and what `kmeans` raises.
    """
    began = time.monotonic()
    first = _first_level(_own_part(points, world), supers, options, given, progress)
    of_level_one = _gather_all(first.assignments, points.n, world)
    claimed = _apply(claim, of_level_one, first.centroids)
    middle = time.monotonic()
    lenient = given.fixed is not None or claim is not None
    merged = _SecondLevel(points, of_level_one, supers, options, world, progress, lenient).run()
    return TwoLevel(
        first.centroids,
        of_level_one,
        merged.centroids.numpy(),
        merged.assignments.numpy(),
        merged.distances.numpy(),
        inertia=merged.inertia(points),
        forced=np.union1d(first.forced, np.flatnonzero(merged.forced.numpy())),
        claimed=claimed,
        subs=merged.subs.numpy(),
        empty_fixed=first.empty_fixed,
        empty_repairs=first.empty_repairs + int(merged.repairs),
        iterations=len(first.history),
        seconds=(middle - began, time.monotonic() - middle),
    )


def _first_level(
    points: ArrayPoints | ShardedPoints,
    supers: int,
    options: KMeansOptions,
    given: Given,
    progress: OnProgress | None,
) -> KMeansResult:
    """Return the super-clusters, each with room for its sub-clusters."""
    k = options.k
    if supers < 1 or k % supers:
        raise RecipeError(f"cluster.supers={supers} must divide cluster.k={k}")
    seed = derive(options.seed, "supers")
    own = replace(options, k=supers, seed=seed, min_size=k // supers)
    try:
        return solve_kmeans(points, own, given, progress)
    except DataError as error:
        raise DataError(_of_supers(error, points.n, k)) from error


@dataclass(frozen=True)
class _SecondLevel:
    """Clusters the super-clusters, each by one rank or each by all."""

    points: ArrayPoints
    supers_of: Int32[np.ndarray, " n"]
    supers: int
    options: KMeansOptions
    world: World
    progress: OnProgress | None
    lenient: bool  # a super-cluster may have fewer distinct rows than sub-clusters
    failed: list[tuple[int, str]] = field(default_factory=list)  # k / supers at most, the message

    @property
    def each(self) -> int:
        """Sub-clusters of a super-cluster."""
        return self.options.k // self.supers

    @property
    def together(self) -> bool:
        """Whether all ranks work on each super-cluster, since there are fewer than ranks."""
        return self.world.size > self.supers

    def run(self) -> _Merged:
        """Return all ranks' sub-clusters, or raise on every rank when one has failed."""
        world, began, inertia = self.world, time.monotonic(), 0.0
        merged = _Merged.zeros(self.points, self.options.k, self.supers)
        jobs = _jobs(self.supers_of, self.supers, ALONE if self.together else world)
        for done, s in enumerate(jobs, start=1):
            ids = np.flatnonzero(self.supers_of == s)
            if len(ids) == 0:  # pinned, and won nothing
                continue
            inertia += self._cluster(s, ids, merged)
            if self.progress is not None:
                seconds = time.monotonic() - began
                self.progress(Progress(done, len(jobs), inertia, 0, seconds, level=2))
        world.barrier()  # without a time limit: a rank's super-clusters may take much longer
        if world.max_int(len(self.failed)):  # on every rank, or the others would wait for us
            raise DataError(
                min(self.failed)[1] if self.failed else "a super-cluster of another rank failed"
            )
        return merged.over(world)

    def _cluster(self, s: int, ids: Int64[np.ndarray, " m"], merged: _Merged) -> float:
        """Cluster one super-cluster into `merged`, or note why not, and return its inertia."""
        inside, each = self.points.select(ids), self.each
        try:
            k = count_distinct(inside, each) if self.lenient else each
            plain = KMeansOptions(
                k, self.options.iterations, derive(self.options.seed, "sub", s),
                empty=self.options.empty, backend=self.options.backend,
            )  # fmt: skip
            result = solve_kmeans(_inside(self.points, ids, self.together, self.world), plain)
        except DataError as error:
            distinct = count_distinct(inside, each)
            self.failed.append(_of_subs(error, s, distinct, self.options.k, self.supers))
            return 0.0
        merged.put(result, ids, s, each, self.world if self.together else ALONE)
        return result.inertia


def _of_supers(error: DataError, n: int, k: int) -> str:
    """Return level one's error with the recipe's keys.

    Its k is cluster.supers there.
    """
    if k > n:
        return f"cluster.k={k} needs as many rows, but there are only {n}. Set it to at most {n}."
    return str(error).replace("cluster.k", "cluster.supers")


def _of_subs(error: DataError, s: int, distinct: int, k: int, supers: int) -> tuple[int, str]:
    """Return a super-cluster's distinct rows, and its error with the recipe's keys."""
    if distinct >= k // supers:
        return distinct, f"super-cluster {s}: {error}"
    return distinct, (
        f"super-cluster {s}: its {k // supers} sub-clusters (cluster.k={k} over cluster.supers="
        f"{supers}) need as many distinct feature rows, but it has only {distinct}. Set cluster.k "
        f"to at most {distinct * supers} or choose fewer super-clusters, or look for duplicate "
        "images or a collapsed backbone."
    )


def kmeans_up_to(points: ArrayPoints, options: KMeansOptions) -> KMeansResult:
    """Cluster into options.k clusters, or one for each distinct row if those are fewer."""
    return solve_kmeans(points, replace(options, k=count_distinct(points, options.k)))


def count_distinct(points: ArrayPoints, most: int) -> int:
    """Return how many distinct rows there are, counted no further than `most`."""
    known = np.zeros((0, points.dim), np.float32)
    for start in range(0, points.n, max(1024, most)):
        rows = points.read_tile(start, max(1024, most)).cpu().numpy()
        known = np.unique(np.concatenate([known, rows]), axis=0)
        if len(known) >= most:
            return most
    return len(known)


def _apply(
    claim: Claim | None, supers: Int32[np.ndarray, " n"], centroids: Float32[np.ndarray, "m d"]
) -> Int64[np.ndarray, " c"]:
    """Give the rows that are claimed to their super-clusters, in place, and return those moved."""
    if claim is None:
        return np.zeros(0, np.int64)
    rows, targets = claim(centroids)
    moved = np.asarray(rows[supers[rows] != targets], np.int64)
    supers[rows] = targets
    return moved


def _own_part(points: ArrayPoints, world: World) -> ArrayPoints | ShardedPoints:
    """Return this rank's contiguous part of all rows, as sharded points."""
    if world.size == 1:
        return points
    own = points.select(np.arange(points.n)[_part(points.n, world)])
    return ShardedPoints(own.move_in(), world)


def _inside(
    points: ArrayPoints, ids: Int64[np.ndarray, " m"], together: bool, world: World
) -> ArrayPoints | ShardedPoints:
    """Return a super-cluster's rows: all, or this rank's part where all ranks cluster them."""
    if not together:
        return points.select(ids).move_in()
    return ShardedPoints(points.select(ids[_part(len(ids), world)]).move_in(), world)


def _part(n: int, world: World) -> slice:
    cuts = np.linspace(0, n, world.size + 1).astype(np.int64)
    return slice(int(cuts[world.rank]), int(cuts[world.rank + 1]))


def _gather_all(own: Int32[np.ndarray, " m"], n: int, world: World) -> Int32[np.ndarray, " n"]:
    """Return all ranks' cluster ids one after the other: n int32, few bytes each."""
    if world.size == 1:
        return own
    cluster_ids = torch.zeros(n, dtype=torch.int32, device=world.device)
    cluster_ids[_part(n, world)] = torch.from_numpy(own)
    return world.all_reduce(cluster_ids).cpu().numpy()


def _jobs(supers_of: Int32[np.ndarray, " n"], supers: int, world: World) -> list[int]:
    """Return this rank's super-clusters: each goes to the rank with the fewest rows so far."""
    sizes = np.bincount(supers_of, minlength=supers)
    load = np.zeros(world.size, np.int64)
    own = []
    for s in np.argsort(-sizes, kind="stable"):
        rank = int(load.argmin())
        load[rank] += sizes[s]
        if rank == world.rank:
            own.append(int(s))
    return own


@dataclass(frozen=True)
class _Merged:
    """The sub-clusters of some super-clusters, zeros elsewhere.

    The sum over ranks is all.
    """

    centroids: torch.Tensor
    assignments: torch.Tensor
    distances: torch.Tensor
    forced: torch.Tensor
    subs: torch.Tensor
    repairs: torch.Tensor

    @classmethod
    def zeros(cls, points: ArrayPoints, k: int, supers: int) -> _Merged:
        """Return the sub-clusters of no super-cluster."""
        n = points.n
        return cls(
            torch.zeros(k, points.dim),
            torch.zeros(n, dtype=torch.int32),
            torch.zeros(n),
            torch.zeros(n, dtype=torch.uint8),
            torch.zeros(supers, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
        )

    def put(self, result: KMeansResult, ids: np.ndarray, s: int, each: int, world: World) -> None:
        """Add a super-cluster.

        `world` are the ranks that all have it, except its assignments.
        """
        base, count, own = s * each, len(result.centroids), ids[_part(len(ids), world)]
        self.assignments[own] = torch.from_numpy(result.assignments) + base
        self.distances[own] = torch.from_numpy(result.distances)
        if not world.is_first:
            return
        self.centroids[base : base + count] = torch.from_numpy(result.centroids)
        self.forced[ids[result.forced]] = 1
        self.subs[s] = count
        self.repairs.add_(result.empty_repairs)

    def inertia(self, points: ArrayPoints) -> float:
        """Return the weighted sum of the distances."""
        bound = points.max_weight() * float(self.distances.max())
        return float(points.weighted_sum(self.distances.to(points.device), bound, points.n))

    def over(self, world: World) -> _Merged:
        """Return the sum over the ranks."""
        parts = (getattr(self, field.name) for field in fields(self))
        return _Merged(*(world.all_reduce(part.to(world.device)).cpu() for part in parts))
