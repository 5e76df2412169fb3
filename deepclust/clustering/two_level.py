"""k-means in two levels: m super-clusters, and inside each of them clusters of its own.

For DeeperCluster (Caron et al., ICCV 2019, section 3.2), whose labels are pairs (super-cluster,
sub-cluster), and as a start for flat k-means with so many clusters that twenty passes over all
centroids are too many: with k = m * m the two levels look at 2 m centroids a row instead of k.

The inner jobs know nothing of each other, so ranks share them out, the largest first; where there
are more ranks than jobs, all work on each. Level one runs on sharded points. Every rank can read
all rows (a memory-mapped file), so no rows travel.

The first super-clusters can be pinned (class prototypes, `prototypes.py`). A pinned one may win few
rows or none: then it has as many sub-clusters as it has distinct rows, and its other ids are empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.init import distinct_rows
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.points import Rows
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.errors import DataError, RecipeError
from deepclust.world import ALONE, World, derive, generator

SAMPLE = 64  # rows per cluster that a start looks at
START_ITERATIONS = 10

# Super-centroids [m, d] -> rows (ascending) and the super-clusters that they take instead
Claim: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class TwoLevel:
    """Both levels; sub-cluster z of super-cluster s has id s * (k / m) + z."""

    super_centroids: Float32[np.ndarray, "m d"]
    supers: Int32[np.ndarray, " n"]
    centroids: Float32[np.ndarray, "k d"]  # zeros for an id that is empty
    assignments: Int32[np.ndarray, " n"]  # nearest sub-centroid of the own super-cluster
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
    k: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    empty: str = "split",
    backend: str = "auto",
    fixed: Rows | None = None,
    init: str | Rows = "random",
    spherical: bool = False,
    claim: Claim | None = None,
    world: World = ALONE,
) -> TwoLevel:
    """Cluster into `supers` super-clusters and each into k / supers sub-clusters.

    `points` are all n rows, on every rank. DeeperCluster makes 10 iterations on each level. A
    super-cluster always has room: it never ends with fewer than k / supers rows, unless it is
    pinned. `fixed`, `init` and `spherical` are those of `kmeans`, for level one alone. `claim`
    names rows that take another super-cluster than the nearest one, before level two; it must
    answer the same on every rank.

    Raises `RecipeError` if `supers` does not divide k, `DataError` if a super-cluster has fewer
    distinct rows than sub-clusters (without `fixed` and `claim`), and what `kmeans` raises.
    """
    if supers < 1 or k % supers:
        raise RecipeError(f"cluster.supers={supers} must divide cluster.k={k}")
    began, each = time.monotonic(), k // supers
    options: dict[str, Any] = {"iterations": iterations, "empty": empty, "backend": backend}
    try:
        first = kmeans(
            _own_part(points, world), supers, seed=derive(seed, "supers"), min_size=each,
            fixed=fixed, init=init, spherical=spherical, **options,
        )  # fmt: skip
    except DataError as error:
        raise DataError(_of_supers(error, points.n, k)) from error
    labels = _everyones(first.assignments, points.n, world)
    claimed = _apply(claim, labels, first.centroids)
    middle = time.monotonic()
    out = _Merged.zeros(points, k, supers)
    failed: list[tuple[int, str]] = []  # what k / supers may be, and the message
    lenient = fixed is not None or claim is not None
    together = world.size > supers  # or some ranks would have nothing to do
    for s, ids in _jobs(labels, supers, ALONE if together else world):
        if len(ids) == 0:  # pinned, and won nothing
            continue
        try:
            count = distinct(points.select(ids), each) if lenient else each
            inside, own = _inside(points, ids, together, world), derive(seed, "sub", s)
            found = kmeans(inside, count, seed=own, **options)
            out.put(found, ids, s, each, world if together else ALONE)
        except DataError as error:
            failed.append(_of_subs(error, s, distinct(points.select(ids), each), k, supers))
    if world.max_int(len(failed)):  # on every rank, or the others would wait for us
        raise DataError(min(failed)[1] if failed else "a super-cluster of another rank failed")
    whole = out.over(world)
    distances = whole.distances.numpy()
    return TwoLevel(
        first.centroids, labels, whole.centroids.numpy(), whole.assignments.numpy(), distances,
        inertia=points.weigh(
            whole.distances.to(points.device),
            points.heaviest() * float(distances.max()), points.n,
        ),
        forced=np.union1d(first.forced, np.flatnonzero(whole.forced.numpy())),
        claimed=claimed,
        subs=whole.subs.numpy(),
        empty_fixed=first.empty_fixed,
        empty_repairs=first.empty_repairs + int(whole.repairs),
        iterations=len(first.history),
        seconds=(middle - began, time.monotonic() - middle),
    )  # fmt: skip


def _of_supers(error: DataError, n: int, k: int) -> str:
    """Level one's error in the recipe's words; what `kmeans` calls k is cluster.supers here."""
    if k > n:
        return f"cluster.k={k} needs as many rows, but there are only {n}. Set it to at most {n}."
    return str(error).replace("cluster.k", "cluster.supers")


def _of_subs(error: DataError, s: int, found: int, k: int, supers: int) -> tuple[int, str]:
    """The super-cluster's distinct rows, and its error in the recipe's words: k is k / supers."""
    if found >= k // supers:
        return found, f"super-cluster {s}: {error}"
    return found, (
        f"super-cluster {s}: its {k // supers} sub-clusters (cluster.k={k} over cluster.supers="
        f"{supers}) need as many distinct feature rows, but it has only {found}. Set cluster.k to "
        f"at most {found * supers} or take fewer super-clusters, or look for duplicate images or "
        "a collapsed backbone."
    )


def up_to(points: ArrayPoints, k: int, **options: Any) -> KMeansResult:
    """`kmeans` into k clusters, or into as many as there are distinct rows, if those are fewer."""
    return kmeans(points, distinct(points, k), **options)


def distinct(points: ArrayPoints, most: int) -> int:
    """How many distinct rows there are, counted no further than `most`."""
    known = np.zeros((0, points.dim), np.float32)
    for start in range(0, points.n, max(1024, most)):
        rows = points.tile(start, max(1024, most)).cpu().numpy()
        known = np.unique(np.concatenate([known, rows]), axis=0)
        if len(known) >= most:
            return most
    return len(known)


def _apply(
    claim: Claim | None, labels: Int32[np.ndarray, " n"], centroids: Float32[np.ndarray, "m d"]
) -> Int64[np.ndarray, " c"]:
    """Give the rows that are claimed to their super-clusters, in place; which ones have moved."""
    if claim is None:
        return np.zeros(0, np.int64)
    rows, targets = claim(centroids)
    moved = np.asarray(rows[labels[rows] != targets], np.int64)
    labels[rows] = targets
    return moved


def start_of(points: ArrayPoints, init: str, k: int, seed: int) -> str | np.ndarray:
    """What `kmeans` takes as `init`: "two-level" is computed here, it knows the others."""
    return two_level_start(points, k, seed) if init == "two-level" else init


def two_level_start(points: ArrayPoints, k: int, seed: int = 0) -> Float32[np.ndarray, "k d"]:
    """Centroids for flat k-means: about sqrt(k) super-clusters, each split by its share of rows.

    Looks at no more than 64 rows a cluster. Where a super-cluster has fewer distinct rows than its
    share, random distinct rows stand in. A few full passes (`kmeans(init=...)`) should follow.
    """
    draws = generator(seed, "kmeans", "two-level")
    size = min(points.n, SAMPLE * k)
    sample = points.select(np.sort(draws.choice(points.n, size, replace=False, shuffle=False)))
    m = max(1, round(k**0.5))
    try:
        labels = kmeans(sample, m, START_ITERATIONS, derive(seed, "supers")).assignments
    except DataError:  # duplicates: fewer distinct rows than super-clusters
        labels = np.zeros(size, np.int32)
    shares = _shares(np.bincount(labels, minlength=m), k)
    parts = []
    for s in np.flatnonzero(shares):
        inside, own = sample.select(np.flatnonzero(labels == s)), derive(seed, "sub", int(s))
        try:
            parts.append(kmeans(inside, int(shares[s]), START_ITERATIONS, own).centroids)
        except DataError:  # duplicates: fewer distinct rows than its share
            continue
    found = torch.from_numpy(np.concatenate([*parts, np.zeros((0, points.dim), np.float32)]))
    found = found.to(points.device)
    rest = distinct_rows(points, k - len(found), found, 0, seed)
    return torch.cat([found, rest]).cpu().numpy()


def _shares(sizes: Int64[np.ndarray, " m"], k: int) -> Int64[np.ndarray, " m"]:
    """Of k clusters each one's, by size (largest remainders), and never more than it has rows."""
    exact = k * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: k - int(shares.sum())]] += 1
    least: Int64[np.ndarray, " m"] = np.minimum(shares, sizes)
    return least


def _own_part(points: ArrayPoints, world: World) -> ArrayPoints | ShardedPoints:
    """This rank's contiguous part of all rows, as sharded points."""
    if world.size == 1:
        return points
    return ShardedPoints(points.select(np.arange(points.n)[_part(points.n, world)]), world)


def _inside(
    points: ArrayPoints, ids: Int64[np.ndarray, " m"], together: bool, world: World
) -> ArrayPoints | ShardedPoints:
    """A super-cluster's rows: all of them, or of those that all ranks cluster this rank's."""
    if not together:
        return points.select(ids)
    return ShardedPoints(points.select(ids[_part(len(ids), world)]), world)


def _part(n: int, world: World) -> slice:
    cuts = np.linspace(0, n, world.size + 1).astype(np.int64)
    return slice(int(cuts[world.rank]), int(cuts[world.rank + 1]))


def _everyones(own: Int32[np.ndarray, " held"], n: int, world: World) -> Int32[np.ndarray, " n"]:
    """All ranks' labels one after the other; n int32 are little beside the features."""
    if world.size == 1:
        return own
    labels = torch.zeros(n, dtype=torch.int32, device=world.device)
    labels[_part(n, world)] = torch.from_numpy(own)
    return world.all_reduce(labels).cpu().numpy()


def _jobs(
    labels: Int32[np.ndarray, " n"], supers: int, world: World
) -> Iterator[tuple[int, Int64[np.ndarray, " m"]]]:
    """This rank's super-clusters and their rows: each goes to the rank with least to do so far."""
    sizes = np.bincount(labels, minlength=supers)
    load = np.zeros(world.size, np.int64)
    for s in np.argsort(-sizes, kind="stable"):
        rank = int(load.argmin())
        load[rank] += sizes[s]
        if rank == world.rank:
            yield int(s), np.flatnonzero(labels == s)


@dataclass(frozen=True)
class _Merged:
    """What the ranks have found, zeros where another one works; the sum over ranks is all."""

    centroids: torch.Tensor
    assignments: torch.Tensor
    distances: torch.Tensor
    forced: torch.Tensor
    subs: torch.Tensor
    repairs: torch.Tensor

    @classmethod
    def zeros(cls, points: ArrayPoints, k: int, supers: int) -> _Merged:
        n = points.n
        return cls(
            torch.zeros(k, points.dim), torch.zeros(n, dtype=torch.int32), torch.zeros(n),
            torch.zeros(n, dtype=torch.uint8), torch.zeros(supers, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip

    def put(self, found: KMeansResult, ids: np.ndarray, s: int, each: int, world: World) -> None:
        """A super-cluster's result; `world` are the ranks that all have it, save the labels."""
        base, count, own = s * each, len(found.centroids), ids[_part(len(ids), world)]
        self.assignments[own] = torch.from_numpy(found.assignments) + base
        self.distances[own] = torch.from_numpy(found.distances)
        if not world.is_first:
            return
        self.centroids[base : base + count] = torch.from_numpy(found.centroids)
        self.forced[ids[found.forced]] = 1
        self.subs[s] = count
        self.repairs.add_(found.empty_repairs)

    def over(self, world: World) -> _Merged:
        parts = (getattr(self, field.name) for field in fields(self))
        return _Merged(*(world.all_reduce(part.to(world.device)).cpu() for part in parts))
