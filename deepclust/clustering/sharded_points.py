"""Points sharded over the ranks of a World: each rank holds some rows, all agree on the sums.

Rank r's rows follow rank r-1's, so an id is the rank's base plus its row. An iteration sends
2 x k x d float64, 2 k numbers and a few more; rows and labels never travel, save the few that
seeding and repairs ask for. On CPUs nearest centroids are exact and sums are on a common grid
(`nearest.py`, `exact.py`), so centroids and assignments are the same to the bit for every number
of ranks, for float16 and float32 rows. On GPUs near-ties may fall either way.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.points import Pass, inertia_of, largest_of, not_finite
from deepclust.errors import NumericalError
from deepclust.world import World


class ShardedPoints:
    """`local` rows of every rank, one after the other; every method is called by all ranks."""

    def __init__(self, local: ArrayPoints, world: World) -> None:
        self.local = local
        self.world = world
        sizes = torch.zeros(world.size, dtype=torch.int64, device=world.device)
        sizes[world.rank] = local.n
        ends = world.all_reduce(sizes).cumsum(0)
        self.n, self.held = int(ends[-1]), local.n
        self.base = int(ends[world.rank]) - local.n
        self.dim, self.device, self.unit = local.dim, local.device, local.unit
        self.power: float | None = None

    def configured(self, *, unit: bool, backend: str) -> ShardedPoints:
        """The same rows, read as unit rows or as they are, searched by `backend`."""
        return ShardedPoints(self.local.configured(unit=unit, backend=backend), self.world)

    def select(self, ids: Int64[np.ndarray, " m"]) -> ShardedPoints:
        """A view of some rows, given in ascending order and the same on all ranks."""
        own = ids[(ids >= self.base) & (ids < self.base + self.held)] - self.base
        return ShardedPoints(self.local.select(own), self.world)

    def check_finite(self) -> None:
        """Raise `NumericalError` on every rank, naming the first rows of each that are not."""
        bad, largest = self.local.survey()
        mine = torch.full((6,), -1, dtype=torch.int64, device=self.world.device)
        mine[0] = len(bad)
        mine[1 : 1 + len(bad[:5])] = torch.from_numpy(bad[:5] + self.base)
        table = self.world.all_gather(mine).cpu().numpy()
        if count := int(table[:, 0].sum()):
            names = table[:, 1:]
            raise NumericalError(not_finite(names[names >= 0], count, self.n))
        heaviest = self.world.max_float(self.local.heaviest())
        self.local.set_grids(self.world.max_float(largest), heaviest, self.n)

    def take(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Copies of some rows, on every rank; each rank gives its own, the rest are zeros."""
        rows = torch.zeros(len(ids), self.dim, device=self.device)
        ours, places = self.holds(ids.to(self.device))
        rows[ours] = self.local.take(places)
        return self.world.all_reduce(rows)

    def holds(self, ids: Int64[Tensor, " m"]) -> tuple[Bool[Tensor, " m"], Int64[Tensor, " h"]]:
        """Which of these ids are held here, and at which row."""
        ours = (ids >= self.base) & (ids < self.base + self.held)
        return ours, ids[ours] - self.base

    def at(self, values: Int32[Tensor, " rows"], ids: Int64[Tensor, " m"]) -> Int32[Tensor, " m"]:
        """The values of these ids, wherever they are held."""
        found = torch.zeros(len(ids), dtype=values.dtype, device=self.device)
        ours, places = self.holds(ids)
        found[ours] = values[places]
        return self.world.all_reduce(found)

    def visit(
        self, centroids: Float32[Tensor, "k d"], before: Pass | None = None, distances: bool = True
    ) -> Pass:
        """Assign every point, and sum up over the ranks."""
        ours = before and replace(before, bins=torch.zeros_like(before.bins))
        whole = self._merged(self.local.visit(centroids, ours, distances))
        if before is not None:
            whole = replace(whole, bins=before.bins + whole.bins)
        if distances:
            return self.recount(whole, whole.labels, whole.distances)
        return replace(whole, inertia=inertia_of(self._power(), whole, centroids))

    def total(self, labels: Int32[Tensor, " rows"], k: int) -> Pass:
        """Sums of given labels (-1: left out), without distances; for a warm start."""
        return self._merged(self.local.total(labels, k))

    def _merged(self, found: Pass) -> Pass:
        """A pass over our rows, its sums over all."""
        bins, weights = self.world.all_reduce(found.bins), self.world.all_reduce(found.weights)
        return replace(
            found, bins=bins, weights=weights, counts=self.world.all_reduce(found.counts)
        )

    def _power(self) -> float:
        """The sum of w |x|^2 over all ranks."""
        if self.power is None:
            ours = torch.tensor(self.local.power, dtype=torch.float64, device=self.world.device)
            self.power = float(self.world.all_reduce(ours))
        return self.power

    def recount(self, found: Pass, labels: Tensor, distances: Tensor) -> Pass:
        """The pass with other labels and distances: counts and inertia anew, sums left as is."""
        mine = torch.bincount(labels, minlength=len(found.counts))
        bound = self.world.max_float(self.local.heaviest() * largest_of(distances))
        inertia = torch.tensor(self.local.weigh(distances, bound, self.n), dtype=torch.float64)
        total = float(self.world.all_reduce(inertia.to(self.world.device)))
        return Pass(
            labels, distances, found.bins, found.weights, self.world.all_reduce(mine), total
        )

    def farthest(self, found: Pass) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Each cluster's farthest member (lowest id of equals) and its distance; -1 if none."""
        ids, distances = self.local.farthest(found)
        most = self.world.all_reduce_max(distances.clone())
        ours = (ids >= 0) & (distances == most)
        lowest = self.world.all_reduce_max(torch.where(ours, -(ids + self.base), -self.n))
        return torch.where(lowest == -self.n, -1, -lowest), most

    def count(self, rows: Bool[Tensor, " rows"]) -> int:
        """How many rows are marked, over all ranks."""
        return int(self.world.all_reduce(rows.sum()))

    def lowest(self, keys: Float32[Tensor, " rows"], m: int) -> tuple[Tensor, Tensor]:
        """Ids and keys of the m rows of lowest finite key: every rank proposes its own m."""
        rows, own = self.local.lowest(keys, m)
        width = self.world.max_int(len(rows))
        ids = torch.full((width,), -1, dtype=torch.int64, device=self.device)
        ids[: len(rows)] = rows + self.base
        padded = torch.zeros(width, device=self.device)
        padded[: len(rows)] = own
        all_ids, all_keys = (self.world.all_gather(part).flatten() for part in (ids, padded))
        all_ids, all_keys = all_ids[all_ids >= 0], all_keys[all_ids >= 0]
        order = torch.argsort(all_keys, stable=True)[:m]  # ranks and so ids ascend among equals
        return all_ids[order], all_keys[order]
