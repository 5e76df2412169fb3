"""Bounds of distances, kept between passes of k-means: most rows need no full search any more.

After a search two numbers are known of a row. Its distance to the own centroid is at most `near`,
and to any other it is at least `far`. When centroids move, both change by no more than these moved
(Hamerly, "Making k-means even faster", SDM 2010). A row whose `near` stays below `far` keeps its
centroid. In most passes a few centroids move far and the rest hardly. So rows that the farthest
moves leave open are compared with the centroids that moved most, by a product with those columns
alone. Only what is still in doubt is searched in full. The first passes gain nothing, and late ones
cost a tenth to a third of the products.

A centroid is kept only where it is nearer than the others by more than float32 could confuse. So
the result has the same bits as a search of every row.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering.nearest import U32, Nearest, Packed, packed_columns
from deepclust.clustering.tile_sizes import searched_rows
from deepclust.clustering.tiles import Tile

PARTS = (32, 16, 8, 4, 2)  # of the columns: one of these is compared with rows in doubt


class Bounds:
    """`near` and `far` of n rows, for the centroids and cluster ids of the pass before."""

    def __init__(self, n: int) -> None:
        self.near = np.full(n, np.inf, np.float32)
        self.far = np.zeros(n, np.float32)
        self._after: tuple[Tensor, Tensor] | None = None

    def hold(self, centroids: Float32[Tensor, "k d"], cluster_ids: Int32[Tensor, " n"]) -> None:
        """Say of which centroids and cluster ids the bounds are."""
        self._after = centroids.clone(), cluster_ids

    def release(
        self, centroids: Float32[Tensor, "k d"], cluster_ids: Tensor | None
    ) -> Float32[Tensor, "k d"] | None:
        """Return the centroids that the bounds are of, if they are of these cluster ids.

        Until the next `hold` they are of none, for a pass that fails leaves them half made.
        """
        after, self._after = self._after, None
        if after is None or after[1] is not cluster_ids or after[0].shape != centroids.shape:
            return None
        return after[0]


class Moves:
    """A pass: where the centroids are about the origin of packed rows, and how far they moved."""

    def __init__(
        self,
        centroids: Float32[Tensor, "k d"],
        origin: Float32[Tensor, " d"],
        bounds: Bounds,
        cluster_ids: Int32[Tensor, " n"] | None,
    ) -> None:
        self.bounds, self._centroids, self._origin = bounds, centroids, origin
        wide = centroids.double()
        k, dim = wide.shape
        order, drifts = torch.arange(k), torch.zeros(k, dtype=torch.float64)
        self._own = np.zeros(0, np.int32)
        before, margin = bounds.release(centroids, cluster_ids), 1 + 2 * (dim + 4) * U32
        if before is not None and cluster_ids is not None:
            self._own = cluster_ids.numpy()
            moved = torch.linalg.vector_norm(wide - before.double(), dim=1) * margin
            drifts, order = torch.sort(moved, descending=True, stable=True)
        offsets = wide[order] - origin.double()
        squares = offsets.square().sum(1)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(k))
        packed = packed_columns(offsets.T, -squares / 2, torch.float32).T.contiguous()
        found = (one.numpy() for one in (packed, order, places, drifts))
        self._moved = loops().Centroids(*found, _choices(k))
        reach = 1.01 * float(squares.max().sqrt())
        self._facts = loops().Facts(dim, margin, 4 * U32, reach, (dim + 16) / 2 * U32)

    @functools.cached_property
    def search(self) -> Nearest:
        """Return the search for rows that are left open: few passes have any."""
        return Nearest(self._centroids, origin=self._origin)

    def nearest(self, packed: Packed, tile: Tile) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of every row of a tile, and renew the bounds."""
        rows, lengths = packed
        own, near, far = (
            part[tile.piece] for part in (self._own, self.bounds.near, self.bounds.far)
        )
        known = loops().Known(rows.numpy(), lengths.numpy(), own, near, far)
        found = loops().assign(known, self._moved, self._facts)
        nearest = torch.from_numpy(found)
        left, size = (nearest < 0).nonzero().flatten(), searched_rows(len(self._centroids))
        for start in range(0, len(left), size):
            places = left[start : start + size]
            nearest[places] = self._search(packed, places, tile)
        return nearest

    def _search(self, packed: Packed, places: Tensor, tile: Tile) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of the rows at some places of a tile, searched in full."""
        some = packed[0].index_select(0, places), packed[1][places]
        return self.search.search(some, lambda open_: tile.take(places[open_]))


def _choices(k: int) -> np.ndarray:
    """Return with how many of k columns rows may be compared first: multiples of 8, int64."""
    counts = {-(-k // part // 8) * 8 for part in PARTS}
    return np.array(sorted(count for count in counts if count < k), np.int64)


def loops() -> ModuleType:
    """Return the compiled loops: a rank that does not cluster need not wait for Numba."""
    from deepclust.clustering import compiled_bounds

    return compiled_bounds
