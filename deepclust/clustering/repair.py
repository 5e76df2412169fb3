"""Empty clusters: split or relocated between iterations, and none left after the last assignment.

FAISS splits between iterations and never looks again, so its last search can return empties: a
+-1/1024 twin of a point mass never wins a point (370-419 of 1,500 clusters on heavy duplicates).
The final repair moves an empty centroid onto a point, which then is at distance zero from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from deepclust.clustering.init import too_few
from deepclust.clustering.points import Pass, Points
from deepclust.errors import DataError

Ids: TypeAlias = np.ndarray
EPSILON = 1 / 1024  # FAISS's: survives float16


def draw_donors(
    sizes: Int64[np.ndarray, " k"], wanted: int, draws: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """At most `wanted` different clusters with two or more points, likelier the larger they are."""
    spare = np.maximum(sizes - 1, 0)
    able = int(np.count_nonzero(spare))
    if able == 0:
        return np.zeros(0, np.int64)
    return draws.choice(len(sizes), min(wanted, able), replace=False, p=spare / spare.sum())


def split(
    points: Points,
    centroids: Tensor,
    found: Pass,
    empty: Ids,
    fixed: int,
    draws: np.random.Generator,
) -> Ids:
    """FAISS's way, in place: an empty takes a donor's centroid, both perturbed oppositely.

    Unlike FAISS (donors scanned from id 0) and DeeperCluster (one donor for all), the donors of a
    pass differ, and are drawn in proportion to their size. Returns the donors.
    """
    sizes = found.counts.cpu().numpy().copy()
    sizes[:fixed] = 0  # a fixed centroid must not be perturbed
    donors = draw_donors(sizes, len(empty), draws)
    targets = empty[: len(donors)]
    signs = torch.where(torch.arange(points.dim, device=points.device) % 2 == 0, EPSILON, -EPSILON)
    source = centroids[donors]
    centroids[targets] = source * (1 + signs)
    centroids[donors] = source * (1 - signs)
    return donors


def relocate(
    points: Points,
    centroids: Tensor,
    found: Pass,
    empty: Ids,
    fixed: int,
    draws: np.random.Generator,
) -> Ids:
    """In place: an empty takes the place of its donor's farthest point. Returns the donors."""
    ids, distances = points.farthest(found)
    sizes = np.where((distances > 0).cpu().numpy(), found.counts.cpu().numpy(), 0)
    donors = draw_donors(sizes, len(empty), draws)
    centroids[empty[: len(donors)]] = points.take(ids[donors])
    return donors


Repair: TypeAlias = Callable[[Points, Tensor, Pass, Ids, int, np.random.Generator], Ids]
REPAIRS: dict[str, Repair] = {"split": split, "relocate": relocate}


@dataclass(frozen=True)
class Repaired:
    """The final assignment with its centroids, and what was done to it."""

    centroids: Float32[Tensor, "k d"]
    found: Pass  # labels, distances, counts and inertia are right; sums and mass are not kept up
    forced: Int64[Tensor, " m"]  # points that were given to a cluster rather than won by it
    repairs: int  # how many empties were moved


def fill_empties(points: Points, centroids: Tensor, found: Pass, fixed: int) -> Repaired:
    """Move every empty free centroid onto a far point, and reassign what is nearer to it.

    Each round moves empties onto the farthest points of different clusters (a point at distance
    zero equals a centroid already and is no use), then compares all points with the moved
    centroids only. A moved centroid holds its point at distance zero, so it is never empty again
    and the rounds end. Raises `DataError` when every point equals a centroid already.
    """
    centroids, forced, repairs = centroids.clone(), [], 0
    while len(empty := (found.counts[fixed:] == 0).nonzero().flatten() + fixed):
        places = _far_places(points, found, len(empty), fixed)
        if len(places) == 0:
            raise DataError(too_few(points, len(centroids) - fixed, centroids[:fixed]))
        targets = empty[: len(places)]
        centroids[targets] = points.take(places)
        found = _reassign(points, centroids, found, targets, places)
        forced.append(places)
        repairs += len(places)
    ids = torch.cat(forced) if forced else torch.zeros(0, dtype=torch.int64, device=points.device)
    return Repaired(centroids, found, torch.unique(ids), repairs)


def _far_places(points: Points, found: Pass, wanted: int, fixed: int) -> Int64[Tensor, " m"]:
    """The farthest point of each of the `wanted` most stretched clusters, of distinct values.

    A free cluster keeps its last point; a fixed one may end empty.
    """
    ids, distances = points.farthest(found)
    spare = found.counts >= 2
    spare[:fixed] = True
    distances = torch.where(spare, distances, 0.0)
    order = torch.argsort(distances, descending=True, stable=True)[:wanted]
    places = ids[order[distances[order] > 0]]
    if len(places) == 0:
        return places
    _, first = np.unique(points.take(places).cpu().numpy(), axis=0, return_index=True)
    return places[torch.from_numpy(np.sort(first)).to(places.device)]


def _reassign(
    points: Points, centroids: Tensor, found: Pass, targets: Tensor, places: Tensor
) -> Pass:
    """Give to the moved centroids what is nearer to them, and their own points in any case."""
    near = points.visit(centroids[targets])
    ids = targets[near.labels.long()].to(torch.int32)
    tie = (near.distances == found.distances) & (ids < found.labels)
    closer = (near.distances < found.distances) | tie
    labels = torch.where(closer, ids, found.labels)
    distances = torch.where(closer, near.distances, found.distances)
    ours, rows = points.holds(places)
    labels[rows] = targets[ours].to(torch.int32)
    distances[rows] = 0.0
    return points.recount(found, labels, distances)


def fill_small(points: Points, done: Repaired, min_size: int, fixed: int) -> Repaired:
    """Bring free clusters up to `min_size`: each takes the nearest points of larger clusters.

    No donor falls below `min_size`. Centroids stay; the points taken are in `forced`.
    """
    found, forced = done.found, [done.forced]
    for small in (found.counts[fixed:] < min_size).nonzero().flatten() + fixed:
        reach = points.visit(done.centroids[small][None]).distances
        taken = _nearest_spare(points, reach, found, int(min_size - found.counts[small]), min_size)
        labels, distances = found.labels.clone(), found.distances.clone()
        _, rows = points.holds(taken)
        labels[rows] = small.to(torch.int32)
        distances[rows] = reach[rows]
        found = points.recount(found, labels, distances)
        forced.append(taken)
    return replace(done, found=found, forced=torch.unique(torch.cat(forced)))


def _nearest_spare(
    points: Points, reach: Float32[Tensor, " rows"], found: Pass, wanted: int, min_size: int
) -> Int64[Tensor, " wanted"]:
    """The nearest points that their clusters can spare; asks again when some run out of them."""
    spare = (found.counts - min_size).clamp(min=0)
    reach, taken = reach.clone(), [torch.zeros(0, dtype=torch.int64, device=points.device)]
    while wanted > 0:
        reach[spare[found.labels.long()] == 0] = torch.inf
        ids, _ = points.lowest(reach, wanted)
        owners = points.at(found.labels, ids).long()
        ids = ids[_rank_within(owners) < spare[owners]]
        _, rows = points.holds(ids)
        reach[rows] = torch.inf
        spare -= torch.bincount(points.at(found.labels, ids).long(), minlength=len(spare))
        taken.append(ids)
        wanted -= len(ids)
    return torch.cat(taken)


def _rank_within(owners: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Of each entry, how many earlier ones have the same owner."""
    order = torch.argsort(owners, stable=True)
    first = torch.searchsorted(owners[order], owners[order])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(owners), device=owners.device) - first
    return rank
