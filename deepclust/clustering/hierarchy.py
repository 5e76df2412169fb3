"""k-means in two levels: m super-clusters, and inside each of them clusters of its own.

For DeeperCluster (Caron et al., ICCV 2019, section 3.2), whose labels are pairs (super-cluster,
sub-cluster), and as a start for flat k-means with so many clusters that twenty passes over all
centroids are too many: with k = m * m the two levels look at 2 m centroids a row instead of k.

The inner jobs know nothing of each other, so ranks share them out, the largest first. Level one
runs on sharded points. Every rank can read all rows (a memory-mapped file), so no rows travel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64

from deepclust.clustering.arrays import ArrayPoints
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.seeding import distinct_rows
from deepclust.clustering.sharded import ShardedPoints
from deepclust.errors import DataError, RecipeError
from deepclust.world import ALONE, World, derive, generator

SAMPLE = 64  # rows per cluster that a start looks at
START_ITERATIONS = 10


@dataclass(frozen=True)
class TwoLevel:
    """Both levels; sub-cluster z of super-cluster s has id s * (k / m) + z."""

    super_centroids: Float32[np.ndarray, "m d"]
    supers: Int32[np.ndarray, " n"]
    centroids: Float32[np.ndarray, "k d"]
    assignments: Int32[np.ndarray, " n"]  # nearest sub-centroid of the own super-cluster
    distances: Float32[np.ndarray, " n"]  # squared, to it
    inertia: float
    forced: Int64[np.ndarray, " f"]  # points that a repair gave to a cluster, of either level
    seconds: tuple[float, float]  # of the levels


def two_level(
    points: ArrayPoints,
    supers: int,
    k: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    empty: str = "split",
    world: World = ALONE,
) -> TwoLevel:
    """Cluster into `supers` super-clusters and each into k / supers sub-clusters.

    `points` are all n rows, on every rank. DeeperCluster makes 10 iterations on each level. A
    super-cluster always has room: it never ends with fewer than k / supers rows.

    Raises `RecipeError` if `supers` does not divide k, `DataError` if a super-cluster has fewer
    distinct rows than sub-clusters, and what `kmeans` raises.
    """
    if supers < 1 or k % supers:
        raise RecipeError(f"cluster.supers={supers} must divide cluster.k={k}")
    began, each = time.monotonic(), k // supers
    first = kmeans(
        _own_part(points, world), supers, iterations, derive(seed, "supers"), empty=empty,
        min_size=each,
    )  # fmt: skip
    labels = _everyones(first.assignments, points.n, world)
    middle = time.monotonic()
    out = _Merged.zeros(points, k)
    failed: list[str] = []
    for s, ids in _jobs(labels, supers, world):
        try:
            own = kmeans(points.select(ids), each, iterations, derive(seed, "sub", s), empty=empty)
            out.put(own, ids, s * each)
        except DataError as error:
            failed.append(f"super-cluster {s}: {error}")
    if world.largest(len(failed)):  # on every rank, or the others would wait for us
        raise DataError(failed[0] if failed else "a super-cluster of another rank failed")
    centroids, assignments, distances, forced = out.over(world)
    return TwoLevel(
        first.centroids, labels, centroids, assignments, distances,
        inertia=points.weigh(
            torch.from_numpy(distances).to(points.device),
            points.heaviest() * float(distances.max()), points.n,
        ),
        forced=np.union1d(first.forced, forced),
        seconds=(middle - began, time.monotonic() - middle),
    )  # fmt: skip


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
    cuts = np.linspace(0, points.n, world.size + 1).astype(np.int64)
    own = points.select(np.arange(cuts[world.rank], cuts[world.rank + 1]))
    return ShardedPoints(own, world)


def _everyones(own: Int32[np.ndarray, " held"], n: int, world: World) -> Int32[np.ndarray, " n"]:
    """All ranks' labels one after the other; n int32 are little beside the features."""
    if world.size == 1:
        return own
    cuts = np.linspace(0, n, world.size + 1).astype(np.int64)
    labels = torch.zeros(n, dtype=torch.int32, device=world.device)
    labels[cuts[world.rank] : cuts[world.rank + 1]] = torch.from_numpy(own)
    return world.sum(labels).cpu().numpy()


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

    @classmethod
    def zeros(cls, points: ArrayPoints, k: int) -> _Merged:
        n = points.n
        return cls(
            torch.zeros(k, points.dim), torch.zeros(n, dtype=torch.int32), torch.zeros(n),
            torch.zeros(n, dtype=torch.uint8),
        )  # fmt: skip

    def put(self, found: KMeansResult, ids: np.ndarray, base: int) -> None:
        self.centroids[base : base + len(found.centroids)] = torch.from_numpy(found.centroids)
        self.assignments[ids] = torch.from_numpy(found.assignments) + base
        self.distances[ids] = torch.from_numpy(found.distances)
        self.forced[ids[found.forced]] = 1

    def over(self, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        parts = (self.centroids, self.assignments, self.distances, self.forced)
        centroids, assignments, distances, forced = (
            world.sum(part.to(world.device)).cpu().numpy() for part in parts
        )
        return centroids, assignments, distances, np.flatnonzero(forced)
