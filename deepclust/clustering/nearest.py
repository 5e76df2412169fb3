"""The nearest centroid, exactly, mostly at the speed of bfloat16: guess, bound the error, decide.

A product in low precision gives every row the centroids that can be its nearest. Their score
is within twice the error bound of the best one. Usually that is one (1.1 to 1.3 on whitened
features). Where it is more, float32 distances by difference decide, ties to the lowest id. So the
result does not depend on the precision of the product or on the tile that a row is in.

On a CPU with avx512_bf16 the bfloat16 product is four times as fast as torch's float32 one and
twice as fast as the best BLAS's. An exact search for k = 1000 takes about the time of the float32
arithmetic alone (`tools/bench/clustering`, kmeans-cpu).

Scores are compared as int16, which orders positive bfloat16 numbers as their values. Rows without
a clearly positive best score, or with many candidates, are compared in float32.

The bounds are Higham's ("Accuracy and Stability of Numerical Algorithms", 3.1), for the roundoff u
of the factors and u' of the sum:
|fl(x.e) - x.e| <= (2u + d u') |x| |e|.
Here u |e| is known better, since what rounding did to the centroids is measured.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

# rows (ascending) and centroids that can be their nearest
Pairs: TypeAlias = tuple[np.ndarray, np.ndarray]
# rows of a tile in bfloat16, less the origin, for a product; and a bound of their lengths
Packed: TypeAlias = tuple[Tensor, Float32[Tensor, " m"]]
# rows float32 [c, d] at some places of a tile
Take: TypeAlias = Callable[[Int64[Tensor, " c"]], Float32[Tensor, "c d"]]

U16, U32 = 2.0**-8, 2.0**-24  # unit roundoffs of bfloat16 and float32
SCORES = 2**22  # float32 scores made at once, and
PAIRS = 4096  # pairs compared at once: both bound the memory of a thread
CROWD = 32  # a row with more candidates than this in bfloat16 is left to float32


class Nearest:
    """Search among centroids: called with rows float32 [m, d], it returns their ids, int64 [m]."""

    def __init__(
        self,
        centroids: Float32[Tensor, "k d"],
        half: bool | None = None,
        origin: Float32[Tensor, " d"] | None = None,
    ) -> None:
        """Prepare the search.

        half: guess in bfloat16 (None: if that is faster on this CPU). origin: what is subtracted
        from rows that are packed (None: the mean centroid, which makes the bounds tightest).
        """
        self.centroids = centroids
        self._kept = threading.local()
        wide = centroids.double()
        self.mean = wide.mean(0).float()
        self.origin = self.mean if origin is None else origin
        offsets = wide - self.mean
        squares = offsets.square().sum(1)
        self.reach = float(squares.max().sqrt())
        # score = (x - m).e - |e|^2 / 2: the largest is nearest. Their mean over the centroids is
        # made zero, so the largest is never negative: bfloat16 can be compared as int16.
        bias = (squares.mean() - squares) / 2
        self.columns = offsets.float().T.contiguous()
        self.bias = bias.float()
        self.half = half_is_faster() if half is None else half
        self.width = -(-(offsets.shape[1] + 3) // 4) * 4  # of a packed row
        self.packed: Tensor | None = None
        if self.half:
            self._prepare_half(offsets, bias)

    def _prepare_half(self, offsets: Tensor, bias: Tensor) -> None:
        """Pack the centroids, and bound the error of a product with them."""
        shift = self.mean.double() - self.origin.double()  # (x - m).e = (x - o).e - (m - o).e
        self.shift = 1.01 * float(torch.linalg.vector_norm(shift))
        self.packed = packed_columns(self.columns, bias - offsets @ shift, torch.bfloat16)
        dim = offsets.shape[1]
        lost = (offsets - self.packed[:dim].T.double()).square().sum(1).max().sqrt()
        # of a product, for a row of length one
        self.error = 1.01 * (U16 + 2 * dim * U32) * self.reach + 1.01 * float(lost)

    def __call__(self, rows: Float32[Tensor, "m d"]) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of every row."""

        def take(places: Tensor) -> Tensor:
            return rows.index_select(0, places)  # 4 times as fast as rows[places]

        if self.packed is not None:
            return self.search(self.pack(rows), take)
        return self._settle(len(rows), [], torch.arange(len(rows)), take)

    def pack(self, rows: Float32[Tensor, "m d"]) -> Packed:
        """Return rows as `search` wants them."""
        assert self.packed is not None
        tile = packed_rows(rows, self.origin, self.packed)
        lengths = torch.linalg.vector_norm(tile[:, : rows.shape[1]], dim=1, dtype=torch.float32)
        return tile, 1.01 * lengths

    def search(self, packed: Packed, take: Take) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of packed rows; `take` reads those that are left open."""
        pairs, left = self._guess(*packed)
        return self._settle(len(packed[0]), [pairs], left, take)

    def _settle(self, m: int, guesses: list[Pairs], left: Tensor, take: Take) -> Tensor:
        """Return the nearest of m rows, those in `left` by float32 scores."""
        block = min(256, max(1, SCORES // len(self.centroids)))
        parts = (part for part in torch.split(left, block) if len(part))
        guesses += (self._score(take(part), part) for part in parts)
        return torch.from_numpy(self._decide(m, guesses, take))

    def _guess(self, tile: Tensor, lengths: Tensor) -> tuple[Pairs, Int64[Tensor, " u"]]:
        """Return candidates by a bfloat16 product, and the rows that it leaves undecided."""
        assert self.packed is not None
        scores, mask = self._space(len(tile))
        torch.mm(tile, self.packed, out=scores)
        whole = scores.view(torch.int16).numpy()
        best = torch.from_numpy(whole.max(1)).view(torch.bfloat16).float()
        lowest = best - 2.02 * (self._bound(lengths) + U16 * best.abs())
        unclear = ~(lowest > 0)
        floor = lowest.clamp(min=0).bfloat16().view(torch.int16) - 1
        floor[unclear] = torch.iinfo(torch.int16).max
        np.greater_equal(whole, floor.numpy()[:, None], out=mask)
        rows_of, ids = _true_entries(mask)
        crowded = np.bincount(rows_of, minlength=len(mask)) > CROWD
        if crowded.any():
            keep = ~crowded[rows_of]
            rows_of, ids = rows_of[keep], ids[keep]
            unclear |= torch.from_numpy(crowded)
        return (rows_of, ids), unclear.nonzero().flatten()

    def _bound(self, lengths: Tensor) -> Tensor:
        """Return how far scores of rows of these lengths, and what decides, may be off."""
        dim = len(self.columns)
        product = self.error * lengths + 8 * U32 * self.reach * (self.reach + self.shift)
        return product + (dim + 4) * U32 * (self.reach + self.shift + lengths) ** 2

    def _space(self, size: int) -> tuple[Tensor, np.ndarray]:
        """Return a thread's scores and mask of a tile.

        New memory would cost a fault every 4 KB.
        """
        kept = self._kept
        if getattr(kept, "size", 0) < size:
            kept.size, k = size, len(self.centroids)
            kept.scores = torch.empty(size, k, dtype=torch.bfloat16)
            kept.mask = np.empty((size, k), bool)
        return kept.scores[:size], kept.mask[:size]

    def _score(self, rows: Float32[Tensor, "u d"], part: Int64[Tensor, " u"]) -> Pairs:
        """Return candidates of some rows, at the places `part`, by a float32 product."""
        centred = rows.sub_(self.mean)
        lengths = torch.linalg.vector_norm(centred, dim=1)
        scores = torch.addmm(self.bias, centred, self.columns)
        product = (2 * rows.shape[1] + 16) * U32 * (self.reach + lengths) ** 2
        lowest = scores.max(1).values - 4 * product
        places, ids = _true_entries((scores >= lowest[:, None]).numpy())
        return part.numpy()[places], ids

    def _decide(self, m: int, guesses: list[Pairs], take: Take) -> Int64[np.ndarray, " m"]:
        """Return each row's only candidate, or the one at the smallest distance, ties by id."""
        nearest = np.zeros(m, np.int64)  # 0 where distances overflow
        for places, ids in guesses:
            nearest[places] = ids
            several = np.zeros(
                len(places) + 1, bool
            )  # whether a pair is of the row of the one before
            np.equal(places[1:], places[:-1], out=several[1:-1])
            rest = np.flatnonzero(several[1:] | several[:-1])
            for part in _whole_rows(places[rest]):
                chosen = rest[part]
                self._compare(take, places[chosen], ids[chosen], nearest)
        return nearest

    def _compare(self, take: Take, places: np.ndarray, ids: np.ndarray, out: np.ndarray) -> None:
        """Write the nearest of each row's candidates.

        Both arrays ascend within a row.
        """
        distances = squared_distances(
            take(torch.from_numpy(places)), self.centroids, torch.from_numpy(ids)
        ).numpy()
        starts = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
        least = np.minimum.reduceat(distances, starts)
        counts = np.diff(np.r_[starts, len(places)])
        # reversed, so that the first of equals is written last
        winners = np.flatnonzero(distances == least.repeat(counts))[::-1]
        out[places[winners]] = ids[winners]


def squared_distances(
    rows: Float32[Tensor, "m d"], centroids: Float32[Tensor, "k d"], ids: Int64[Tensor, " m"]
) -> Float32[Tensor, " m"]:
    """Return |x - c|^2 of every row, by difference: 0 for equals, no cancellation."""
    return centroids.index_select(0, ids).sub_(rows).square_().sum(1)


def first_of_equals(centroids: Float32[Tensor, "k d"]) -> Int64[Tensor, " k"]:
    """Return for each centroid the lowest id with the same value.

    A product rounds equal columns differently when they fall into different kernels, so an argmin
    alone does not send ties to the lowest id. Equal rows meet after a stable sort by a projection.
    """
    wide = centroids.double()
    weights = torch.linspace(1, 2, wide.shape[1], dtype=torch.float64, device=wide.device)
    order = torch.argsort((wide * weights.sqrt()).sum(1), stable=True)
    ranked = centroids[order]
    opens = torch.ones_like(order, dtype=torch.bool)
    opens[1:] = (ranked[1:] != ranked[:-1]).any(1)
    group = opens.cumsum(0) - 1
    lowest = torch.full_like(order, len(order)).scatter_reduce_(0, group, order, "amin")
    return torch.empty_like(order).scatter_(0, order, lowest[group])


def packed_columns(columns: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return columns [d, k] in half precision over the bias [k] in three parts, padded to 4.

    The parts hold 24 bits of the bias in bfloat16, so that a product adds it at no cost.
    """
    dim, k = columns.shape
    packed = torch.zeros(-(-(dim + 3) // 4) * 4, k, dtype=dtype, device=columns.device)
    packed[:dim] = columns
    rest = bias.clone()
    for row in range(dim, dim + 3):
        packed[row] = rest
        rest -= packed[row].double()
    return packed


def packed_rows(
    rows: Float32[Tensor, "m d"], origin: Float32[Tensor, " d"], packed: Tensor
) -> Tensor:
    """Return rows - origin for a product with `packed`: half precision, then ones."""
    dim = rows.shape[1]
    tile = torch.empty(len(rows), len(packed), dtype=packed.dtype, device=rows.device)
    torch.sub(rows, origin, out=tile[:, :dim])
    tile[:, dim : dim + 3] = 1
    tile[:, dim + 3 :] = 0
    return tile


def _true_entries(mask: np.ndarray) -> Pairs:
    """Return row and column of every true entry, row by row."""
    flat = np.flatnonzero(mask)
    rows = flat // mask.shape[1]
    return rows, flat - rows * mask.shape[1]


def _whole_rows(places: np.ndarray) -> Iterator[slice]:
    """Cut ascending row numbers into stretches of about PAIRS entries that split no row."""
    start = 0
    while start < len(places):
        stop = min(start + PAIRS, len(places))
        stop = int(np.searchsorted(places, places[stop - 1], side="right"))
        yield slice(start, stop)
        start = stop


@functools.cache
def half_is_faster() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32, from a short test."""
    rows, columns = torch.ones(512, 256), torch.ones(256, 512)
    return _seconds(rows.bfloat16(), columns.bfloat16()) < 0.7 * _seconds(rows, columns)


def _seconds(rows: Tensor, columns: Tensor) -> float:
    """Return the time of the fastest of five products."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(rows, columns)
        best = min(best, time.perf_counter() - started)
    return best
