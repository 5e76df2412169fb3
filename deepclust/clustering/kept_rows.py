"""Rows packed for a product and kept between the passes of k-means, where memory allows.

The exact search of a CPU (`nearest.py`) guesses from a product of centred rows. Packing reads and
writes every row, which takes longer than the product itself when there are few centroids. Rows do
not change between passes, so they are packed once, about the mean of the first centroids. Later
passes read a row itself only if its guess is open or if it changed its cluster.

With packed rows of float32 go bounds of their distances (`bounds.py`). Nothing here can change a
result: the error bounds hold for any origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from deepclust.clustering.bounds import Bounds, Moves, loops
from deepclust.clustering.nearest import Nearest, pack
from deepclust.clustering.tiles import Tile

MOST = 2**30  # bytes that may be kept; of rows that are in memory, as much as they take there
SHARE = 0.25  # of the memory that is free, because other ranks of this machine keep theirs


@dataclass
class KeptRows:
    """Packed rows [n, width] and a bound of each row's length [n], about one origin [d]."""

    origin: Float32[Tensor, " d"]
    rows: Tensor
    lengths: Float32[Tensor, " n"]
    packed: Bool[np.ndarray, " n"]  # which rows are there already
    bounds: Bounds | None

    @classmethod
    def empty(cls, n: int, search: Nearest) -> KeptRows:
        """Return room for n rows, about the origin of a search."""
        rows = torch.empty(n, search.width, dtype=search.dtype)
        bounds = Bounds(n) if search.dtype == torch.float32 else None
        return cls(search.origin, rows, torch.empty(n), np.zeros(n, bool), bounds)

    def nearest(self, search: Nearest | Moves, tile: Tile) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of every row of a tile, by a search about this origin.

        Rows that are not there yet are packed and kept.
        """
        piece = tile.piece
        if not self.packed[piece].all():
            self._pack(tile.rows, piece)
        packed = self.rows[piece], self.lengths[piece]
        if isinstance(search, Moves):
            return search.nearest(packed, tile)
        return search.search(packed, tile.take)

    def _pack(self, rows: Float32[Tensor, "m d"], piece: slice) -> None:
        """Pack the rows of a tile."""
        into, lengths = self.rows[piece], self.lengths[piece]
        if into.dtype == torch.float32:
            loops().pack(rows.numpy(), self.origin.numpy(), into.numpy(), lengths.numpy())
        else:
            into[:], lengths[:] = pack(rows, self.origin, into.shape[1], into.dtype)
        self.packed[piece] = True

    def search(self, centroids: Float32[Tensor, "k d"], before: Tensor | None) -> Nearest | Moves:
        """Return a search for a pass after that of the cluster ids `before`.

        Beside rows in bfloat16, whose products are cheap, bounds were not tried.
        """
        if self.bounds is None:
            return Nearest(centroids, origin=self.origin)
        return Moves(centroids, self.origin, self.bounds, before)


def may_keep(n: int, row_bytes: int, in_memory: int) -> bool:
    """Return whether n packed rows may be kept, beside rows of `in_memory` bytes (0: a file)."""
    need = n * (row_bytes + 13)  # beside a row its length, bounds, and whether it is there
    return need <= max(MOST, in_memory) and need <= SHARE * free_memory()


def free_memory() -> float:
    """Return the bytes that programs can get without swapping; infinite where no one says."""
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(facts["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")
