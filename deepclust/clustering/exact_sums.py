"""Sums that do not depend on their order: numbers are rounded to a grid where float64 is exact.

A float64 holds 53 bits. If every number is a multiple of g and no partial sum exceeds 2^52 g, all
additions are exact. Threads, tiles and ranks can then add in any order and agree to the bit. The
grid is chosen from the largest number and the count: for 1M unit rows g = 2^-31, for 100M 2^-24.
What rounding drops goes into a second partial sum with a finer grid, so that small numbers next to
large ones are not lost.

Source: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013.
"""

from __future__ import annotations

import math
from threading import Lock

import torch
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from deepclust.clustering.tiles import Tile

BITS = 51  # one less than the 52 of the fraction, since `on_grid` needs the next one
MAGIC = 1.5 * 2.0**52  # times a grid: what is added to it keeps its multiples only


def grid_of(largest: float, count: int) -> float:
    """Return a power of two g so that `count` multiples of g up to `largest` add exactly."""
    if largest == 0 or count == 0:
        return 0.0
    if not math.isfinite(largest):
        return largest
    return 2.0 ** (math.ceil(math.log2(largest) + math.log2(count)) - BITS)


def on_grid(values: Float64[Tensor, " *shape"], grid: float) -> Float64[Tensor, " *shape"]:
    """Round to multiples of `grid` in place (half to even): adding 1.5 * 2^52 g drops the rest."""
    magic = MAGIC * grid
    return values.add_(magic).sub_(magic)


PARTIALS = 2


def into_partials(
    values: Float64[Tensor, " *shape"], grid: float, count: int
) -> Float64[Tensor, "partials ..."]:
    """Split values into multiples of `grid` and, second, of the next grid for what is left."""
    partials = torch.empty(PARTIALS, *values.shape, dtype=values.dtype, device=values.device)
    torch.sub(values, on_grid(partials[0].copy_(values), grid), out=partials[1])
    on_grid(partials[1], grid_of(grid, count))
    return partials


def sums_by_id(
    ids: Int64[Tensor, " m"] | Int32[Tensor, " m"],
    k: int,
    values: Float64[Tensor, " m"] | None = None,
) -> Tensor:
    """Return how often each id 0..k-1 occurs, int64 [k], or the sums of its values, float64 [k].

    torch.bincount makes the host wait for a GPU, to see the largest id.
    """
    if not ids.is_cuda:
        return torch.bincount(ids, values, minlength=k)
    added = torch.ones_like(ids, dtype=torch.int64) if values is None else values
    return torch.zeros(k, dtype=added.dtype, device=ids.device).index_add_(0, ids, added)


class ClusterSums:
    """Weighted sums of the rows of each cluster, added tile by tile from any thread.

    They start with the sums of an earlier pass, or with zeros. After an earlier pass only the rows
    that moved are added and taken off, which gives the same bits with much less work.
    """

    def __init__(self, partials: Float64[Tensor, "partials k d"], grid: float, count: int) -> None:
        self.partials = partials
        self._grid = grid
        self._count = count
        self._lock = Lock()

    def add(
        self,
        clusters: Int64[Tensor, " m"],
        rows: Float32[Tensor, "m d"],
        weights: Float64[Tensor, " m"] | None,
        before: Int64[Tensor, " m"] | None = None,
    ) -> None:
        """Add rows to their clusters' sums, and take them off those of the clusters `before`."""
        if not rows.is_cuda:
            self._add_here(clusters, rows, weights, before)
            return
        wide = rows.double() if weights is None else rows * weights[:, None]
        parts = into_partials(wide, self._grid, self._count)
        self.partials.index_add_(1, clusters, parts)
        if before is not None:
            self.partials.index_add_(1, before, parts, alpha=-1)

    def _add_here(
        self, clusters: Tensor, rows: Tensor, weights: Tensor | None, before: Tensor | None
    ) -> None:
        """Add rows on a CPU, each while it is in the cache."""
        from deepclust.clustering.compiled import add_rows  # Numba takes 0.3 s to import

        magic = MAGIC * self._grid, MAGIC * grid_of(self._grid, self._count)
        arrays = (None if one is None else one.numpy() for one in (weights, before))
        with self._lock:
            add_rows(self.partials.numpy(), magic, clusters.numpy(), rows.numpy(), *arrays)

    def move(
        self,
        before: Int32[Tensor, " m"],
        clusters: Int64[Tensor, " m"],
        tile: Tile,
        weights: Float64[Tensor, " m"] | None,
    ) -> None:
        """Move the rows of a tile from their clusters `before` to new ones.

        On a GPU those that stay are added as zeros, since to leave them out the host would have to
        wait for their number.
        """
        moved = clusters != before
        if clusters.is_cuda:
            stays = moved.double() if weights is None else moved * weights
            self.add(clusters, tile.rows, stays, before.long())
            return
        places = moved.nonzero().flatten()
        weights = None if weights is None else weights[places]
        self.add(clusters[places], tile.take(places), weights, before[places].long())
