"""Points sharded over the ranks of a World: each rank has some rows, all have the same sums.

Rank r's rows follow rank r-1's, so an id is the rank's base plus its row. An iteration sends
2 x k x d float64, 2 k numbers and a few more. Rows and cluster ids are not sent, except the few
that the start and the repairs need. On CPUs nearest centroids are exact and sums are on a common
grid (`nearest.py`, `exact_sums.py`). So centroids and assignments have the same bits for every
number of ranks, for float16 and float32 rows. A GPU that Triton serves decides near-ties as a CPU
(`fused.py`), others may send them either way.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from torch import Tensor

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.points import Assignment, cost_of, largest_of, not_finite
from deepclust.errors import NumericalError
from deepclust.world import World


class ShardedPoints:
    """The `local` rows of every rank, one after the other.

    All ranks call every method.
    """

    def __init__(self, local: ArrayPoints, world: World) -> None:
        self.local = local
        self.world = world
        sizes = torch.zeros(world.size, dtype=torch.int64, device=world.device)
        sizes[world.rank] = local.n
        ends = world.all_reduce(sizes).cumsum(0)
        self.n, self.n_local = int(ends[-1]), local.n
        self.base = int(ends[world.rank]) - local.n
        self.dim, self.device, self.spherical = local.dim, local.device, local.spherical
        self.sum_sq: Float64[Tensor, ""] | None = None

    def configure(self, *, spherical: bool, backend: str) -> ShardedPoints:
        """Return the same rows, read as unit rows or as they are, searched by `backend`."""
        return ShardedPoints(self.local.configure(spherical=spherical, backend=backend), self.world)

    def select(self, ids: Int64[np.ndarray, " m"]) -> ShardedPoints:
        """Return a view of some rows, given in ascending order and the same on all ranks."""
        own = ids[(ids >= self.base) & (ids < self.base + self.n_local)] - self.base
        return ShardedPoints(self.local.select(own), self.world)

    def check_finite(self) -> None:
        """Raise `NumericalError` on every rank, naming the first rows of each that are not."""
        bad, largest = self.local.scan_values()
        mine = torch.full((6,), -1, dtype=torch.int64, device=self.world.device)
        mine[0] = len(bad)
        mine[1 : 1 + len(bad[:5])] = torch.from_numpy(bad[:5] + self.base)
        table = self.world.all_gather(mine).cpu().numpy()
        if count := int(table[:, 0].sum()):
            names = table[:, 1:]
            raise NumericalError(not_finite(names[names >= 0], count, self.n))
        max_weight = self.world.max_float(self.local.max_weight())
        self.local.set_grids(self.world.max_float(largest), max_weight, self.n)

    def list_weights(self) -> Float64[np.ndarray, " n"] | None:
        """Return the weights of all n rows, or None where no rank has weights."""
        own = self.local.list_weights()
        if not self.world.max_int(own is not None):
            return None
        weights = torch.zeros(self.n, dtype=torch.float64, device=self.world.device)
        part = torch.ones(self.n_local) if own is None else torch.from_numpy(own)
        weights[self.base : self.base + self.n_local] = part.to(weights)
        return self.world.all_reduce(weights).cpu().numpy()

    def weighs(self) -> Bool[Tensor, " rows"] | None:
        """Return which of this rank's rows weigh more than nothing, or None if those of all do."""
        own = self.local.weighs()
        if not self.world.max_int(own is not None):
            return None
        return (
            torch.ones(self.n_local, dtype=torch.bool, device=self.device) if own is None else own
        )

    def gather(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Return copies of some rows on every rank: the sum of what each rank has of them."""
        rows = torch.zeros(len(ids), self.dim, device=self.device)
        ours, places = self.locate(ids.to(self.device))
        rows[ours] = self.local.gather(places)
        return self.world.all_reduce(rows)

    def locate(self, ids: Int64[Tensor, " m"]) -> tuple[Bool[Tensor, " m"], Int64[Tensor, " h"]]:
        """Return which of these ids are in this process, and at which row."""
        ours = (ids >= self.base) & (ids < self.base + self.n_local)
        return ours, ids[ours] - self.base

    def gather_values(
        self, values: Int32[Tensor, " rows"], ids: Int64[Tensor, " m"]
    ) -> Int32[Tensor, " m"]:
        """Return the values of these ids, from whichever rank has them."""
        gathered = torch.zeros(len(ids), dtype=values.dtype, device=self.device)
        ours, places = self.locate(ids)
        gathered[ours] = values[places]
        return self.world.all_reduce(gathered)

    def assign_to(
        self,
        centroids: Float32[Tensor, "k d"],
        before: Assignment | None = None,
        distances: bool = True,
    ) -> Assignment:
        """Assign every point, and sum up over the ranks."""
        ours = before and replace(before, partials=torch.zeros_like(before.partials))
        whole = self._merge(self.local.assign_to(centroids, ours, distances))
        if before is not None:
            whole = replace(whole, partials=before.partials + whole.partials)
        if distances:
            return self.recount(whole, whole.cluster_ids, whole.distances)
        return replace(whole, cost=cost_of(self._sum_sq(), whole, centroids))

    def sum_clusters(self, cluster_ids: Int32[Tensor, " rows"], k: int) -> Assignment:
        """Sum up the rows of given clusters (-1: left out), without distances."""
        return self._merge(self.local.sum_clusters(cluster_ids, k))

    def _merge(self, assignment: Assignment) -> Assignment:
        """Return an assignment of this rank's rows with the sums of all ranks."""
        partials, mass = (
            self.world.all_reduce(assignment.partials),
            self.world.all_reduce(assignment.partial_mass),
        )
        return replace(
            assignment,
            partials=partials,
            partial_mass=mass,
            counts=self.world.all_reduce(assignment.counts),
        )

    def _sum_sq(self) -> Float64[Tensor, ""]:
        """Return the sum of w |x|^2 over all ranks."""
        if self.sum_sq is None:
            assert self.local.sum_sq is not None
            self.sum_sq = self.world.all_reduce(self.local.sum_sq.to(self.world.device, copy=True))
        return self.sum_sq

    def recount(self, assignment: Assignment, cluster_ids: Tensor, distances: Tensor) -> Assignment:
        """Return the assignment with other clusters and distances.

        Its sums stay as they were.
        """
        mine = self.local.count_members(cluster_ids, len(assignment.counts))
        bound = self.world.max_float(self.local.max_weight() * largest_of(distances))
        cost = self.local.weighted_sum(distances, bound, self.n)
        total = self.world.all_reduce(cost.to(self.world.device))
        return Assignment(
            cluster_ids,
            distances,
            assignment.partials,
            assignment.partial_mass,
            self.world.all_reduce(mine),
            total,
        )

    def find_farthest(
        self, assignment: Assignment
    ) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Return each cluster's farthest member (ties: lowest id) and its distance; -1: none."""
        ids, distances = self.local.find_farthest(assignment)
        most = self.world.all_reduce_max(distances.clone())
        ours = (ids >= 0) & (distances == most)
        lowest = self.world.all_reduce_max(torch.where(ours, -(ids + self.base), -self.n))
        return torch.where(lowest == -self.n, -1, -lowest), most

    def count(self, rows: Bool[Tensor, " rows"]) -> Int64[Tensor, ""]:
        """Return how many rows are marked, over all ranks."""
        return self.world.all_reduce(rows.sum())

    def find_lowest(self, keys: Float32[Tensor, " rows"], m: int) -> tuple[Tensor, Tensor]:
        """Return ids and keys of the m rows of lowest finite key: the best of every rank's m."""
        rows, own = self.local.find_lowest(keys, m)
        width = self.world.max_int(len(rows))
        ids = torch.full((width,), -1, dtype=torch.int64, device=self.device)
        ids[: len(rows)] = rows + self.base
        padded = torch.zeros(width, device=self.device)
        padded[: len(rows)] = own
        all_ids, all_keys = (self.world.all_gather(part).flatten() for part in (ids, padded))
        all_ids, all_keys = all_ids[all_ids >= 0], all_keys[all_ids >= 0]
        order = torch.argsort(all_keys, stable=True)[:m]  # ranks and so ids ascend among equals
        return all_ids[order], all_keys[order]
