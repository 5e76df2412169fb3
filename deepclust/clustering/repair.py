"""Repair of empty clusters, between iterations (split, relocate) and after the last assignment.

FAISS splits between iterations and not after its last search, which can leave clusters empty. A
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
from deepclust.clustering.points import Assignment, Points
from deepclust.errors import DataError

Ids: TypeAlias = np.ndarray
EPSILON = 1 / 1024  # FAISS's: survives float16


def draw_donors(
    sizes: Int64[np.ndarray, " k"], wanted: int, draws: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """Draw at most `wanted` different clusters with two or more points, by size."""
    spare = np.maximum(sizes - 1, 0)
    able = int(np.count_nonzero(spare))
    if able == 0:
        return np.zeros(0, np.int64)
    return draws.choice(len(sizes), min(wanted, able), replace=False, p=spare / spare.sum())


def split(
    points: Points,
    centroids: Tensor,
    assignment: Assignment,
    empty: Ids,
    fixed: int,
    draws: np.random.Generator,
) -> Ids:
    """Move empties onto donors' centroids, both perturbed oppositely as in FAISS, in place.

    FAISS scans donors from id 0, and DeeperCluster uses one donor for all. Here the donors of a
    pass differ, and are drawn in proportion to their size. Returns the donors.
    """
    sizes = assignment.counts.cpu().numpy().copy()
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
    assignment: Assignment,
    empty: Ids,
    fixed: int,
    draws: np.random.Generator,
) -> Ids:
    """Move empties onto donors' farthest points, in place, and return the donors."""
    ids, distances = points.find_farthest(assignment)
    sizes = np.where((distances > 0).cpu().numpy(), assignment.counts.cpu().numpy(), 0)
    donors = draw_donors(sizes, len(empty), draws)
    centroids[empty[: len(donors)]] = points.gather(ids[donors])
    return donors


Repair: TypeAlias = Callable[[Points, Tensor, Assignment, Ids, int, np.random.Generator], Ids]
REPAIRS: dict[str, Repair] = {"split": split, "relocate": relocate}


@dataclass(frozen=True)
class Repaired:
    """The final assignment with its centroids, and what was done to it."""

    centroids: Float32[Tensor, "k d"]
    assignment: Assignment  # its sums and mass are those before the repair
    forced: Int64[Tensor, " m"]  # points that were given to a cluster rather than won by it
    repairs: int  # how many empties were moved


def fill_empties(
    points: Points, centroids: Tensor, assignment: Assignment, fixed: int, any_empty: bool = True
) -> Repaired:
    """Move every empty free centroid onto a far point, and reassign what is nearer to it.

    `any_empty` is False where the caller knows that there is none.

    Each round moves empties onto the farthest points of different clusters, then compares all
    points with the moved centroids only. A point at distance zero is not used, since it equals a
    centroid already. A moved centroid keeps its point at distance zero, so it stays non-empty and
    the rounds end.

    Raises `DataError` when every point equals a centroid already.
    """
    none = torch.zeros(0, dtype=torch.int64, device=points.device)
    if not any_empty:
        return Repaired(centroids, assignment, none, 0)
    centroids, forced, repairs = centroids.clone(), [none], 0
    while len(empty := (assignment.counts[fixed:] == 0).nonzero().flatten() + fixed):
        places = _far_places(points, assignment, len(empty), fixed)
        if len(places) == 0:
            raise DataError(too_few(points, len(centroids) - fixed, centroids[:fixed]))
        targets = empty[: len(places)]
        centroids[targets] = points.gather(places)
        assignment = _reassign(points, centroids, assignment, targets, places)
        forced.append(places)
        repairs += len(places)
    return Repaired(centroids, assignment, torch.unique(torch.cat(forced)), repairs)


def _far_places(
    points: Points, assignment: Assignment, wanted: int, fixed: int
) -> Int64[Tensor, " m"]:
    """Return the farthest point of each of the `wanted` most stretched clusters, values distinct.

    A free cluster keeps its last point. A fixed one may end empty.
    """
    ids, distances = points.find_farthest(assignment)
    spare = assignment.counts >= 2
    spare[:fixed] = True
    distances = torch.where(spare, distances, 0.0)
    order = torch.argsort(distances, descending=True, stable=True)[:wanted]
    places = ids[order[distances[order] > 0]]
    if len(places) == 0:
        return places
    _, first = np.unique(points.gather(places).cpu().numpy(), axis=0, return_index=True)
    return places[torch.from_numpy(np.sort(first)).to(places.device)]


def _reassign(
    points: Points, centroids: Tensor, assignment: Assignment, targets: Tensor, places: Tensor
) -> Assignment:
    """Assign to the moved centroids what is nearer to them, and the points they were moved to."""
    if points.weighs() is not None:  # an empty cluster may have rows of weight 0, left behind now
        everything = points.assign_to(centroids)
        cluster_ids, distances = everything.cluster_ids.clone(), everything.distances.clone()
    else:
        cluster_ids, distances = _nearer(points, centroids, assignment, targets)
    ours, rows = points.locate(places)
    cluster_ids[rows] = targets[ours].to(torch.int32)
    distances[rows] = 0.0
    return points.recount(assignment, cluster_ids, distances)


def _nearer(
    points: Points, centroids: Tensor, assignment: Assignment, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return clusters and distances when the moved centroids take what is nearer to them."""
    near = points.assign_to(centroids[targets])
    ids = targets[near.cluster_ids.long()].to(torch.int32)
    tie = (near.distances == assignment.distances) & (ids < assignment.cluster_ids)
    closer = (near.distances < assignment.distances) | tie
    cluster_ids = torch.where(closer, ids, assignment.cluster_ids)
    return cluster_ids, torch.where(closer, near.distances, assignment.distances)


def fill_small(points: Points, repaired: Repaired, min_size: int, fixed: int) -> Repaired:
    """Bring free clusters up to `min_size` with the nearest points of larger clusters.

    No donor falls below `min_size`. Centroids stay. The points taken are in `forced`. Rows of
    weight 0 do not count.
    """
    assignment, forced, weighs = repaired.assignment, [repaired.forced], points.weighs()
    for small in (assignment.counts[fixed:] < min_size).nonzero().flatten() + fixed:
        reach = points.assign_to(repaired.centroids[small][None]).distances
        able = reach if weighs is None else torch.where(weighs, reach, torch.inf)
        taken = _nearest_spare(
            points, able, assignment, int(min_size - assignment.counts[small]), min_size
        )
        cluster_ids, distances = assignment.cluster_ids.clone(), assignment.distances.clone()
        _, rows = points.locate(taken)
        cluster_ids[rows] = small.to(torch.int32)
        distances[rows] = reach[rows]
        assignment = points.recount(assignment, cluster_ids, distances)
        forced.append(taken)
    return replace(repaired, assignment=assignment, forced=torch.unique(torch.cat(forced)))


def _nearest_spare(
    points: Points,
    reach: Float32[Tensor, " rows"],
    assignment: Assignment,
    wanted: int,
    min_size: int,
) -> Int64[Tensor, " wanted"]:
    """Return the nearest points that their clusters can spare."""
    spare = (assignment.counts - min_size).clamp(min=0)
    reach, taken = reach.clone(), [torch.zeros(0, dtype=torch.int64, device=points.device)]
    while wanted > 0:
        reach[spare[assignment.cluster_ids.long()] == 0] = torch.inf
        ids, _ = points.find_lowest(reach, wanted)
        owners = points.gather_values(assignment.cluster_ids, ids).long()
        ids = ids[_rank_within(owners) < spare[owners]]
        _, rows = points.locate(ids)
        reach[rows] = torch.inf
        spare -= torch.bincount(
            points.gather_values(assignment.cluster_ids, ids).long(), minlength=len(spare)
        )
        taken.append(ids)
        wanted -= len(ids)
    return torch.cat(taken)


def _rank_within(owners: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Return for each entry how many earlier ones have the same owner."""
    order = torch.argsort(owners, stable=True)
    first = torch.searchsorted(owners[order], owners[order])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(owners), device=owners.device) - first
    return rank
