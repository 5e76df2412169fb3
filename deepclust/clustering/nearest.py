"""The nearest centroid, exactly, at the speed of a product: guess, bound the error, decide.

A product gives every row the centroids that can be its nearest. Their score is within twice the
error bound of the best one. Usually that is one. Where it is more, float32 distances by difference
decide, ties to the lowest id. So the result does not depend on the precision of the product or on
the tile that a row is in.

The product is bfloat16 where the CPU is faster with it, else float32. On a CPU with avx512_bf16 it
is four times as fast as torch's float32 one. There whitened features have 1.1 to 1.3 candidates.

Scores are compared as integers, which orders positive numbers as their values. Rows without a
clearly positive best score, or with many candidates, are scored again about the mean centroid. What
follows the product is compiled (`compiled.py`).

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
from types import ModuleType
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

# rows (ascending), where their candidates begin, and these: centroids that can be their nearest
Candidates: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
# rows of a tile in bfloat16, less the origin, for a product; and a bound of their lengths
Packed: TypeAlias = tuple[Tensor, Float32[Tensor, " m"]]
# rows float32 [c, d] at some places of a tile
Take: TypeAlias = Callable[[Int64[Tensor, " c"]], Float32[Tensor, "c d"]]

U32 = 2.0**-24
FAINT = 1e-34  # of a score: what numbers too small for float32 may lose
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: U32}  # of the types of a guess, and
INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # how their scores are compared
SCORES = 2**22  # float32 scores made at once, and
PAIRS = 4096  # pairs compared at once: both bound the memory of a thread
CACHED = 2**16  # numbers that a core has in its cache, in float64
AT_ONCE = 8  # columns of a product: what a kernel of BLAS takes at once
KEYED = 512  # scores of a row, at most, whose columns may take the low bits
LOSING = -1e38  # a score that is never the best
CROWD = 32  # a row with more candidates than this is left to scores about the mean


class Nearest:
    """Search among centroids: called with rows float32 [m, d], it returns their ids, int64 [m]."""

    def __init__(
        self,
        centroids: Float32[Tensor, "k d"],
        half: bool | None = None,
        origin: Float32[Tensor, " d"] | None = None,
    ) -> None:
        """Prepare the search.

        half: guess in bfloat16, else in float32 (None: what is faster on this CPU). origin: what is
        subtracted from rows that are packed (None: the mean centroid, for the tightest bounds).
        """
        self.centroids = centroids
        self._plain = centroids.contiguous().numpy()  # for compiled loops
        self._gap = 4 * (centroids.shape[1] + 4) * U32
        self._kept = threading.local()
        wide = centroids.double()
        self.mean = wide.mean(0).float()
        self.origin = self.mean if origin is None else origin
        offsets = wide - self.mean
        squares = offsets.square().sum(1)
        self.reach = float(squares.max().sqrt())
        # score = (x - m).e - |e|^2 / 2: the largest is nearest. Their mean over the centroids is
        # made zero, so the largest is never negative: scores can be compared as integers.
        bias = (squares.mean() - squares) / 2
        self.columns = offsets.float().T.contiguous()
        self.bias = bias.float()
        half = half_is_faster() if half is None else half
        self.dtype = torch.bfloat16 if half else torch.float32
        self.width = -(-(offsets.shape[1] + 3) // 4) * 4  # of a packed row
        self.row_bytes = self.width * self.dtype.itemsize
        self._prepare(offsets, bias)

    def _prepare(self, offsets: Tensor, bias: Tensor) -> None:
        """Pack the centroids, and bound the error of a product with them."""
        shift = self.mean.double() - self.origin.double()  # (x - m).e = (x - o).e - (m - o).e
        away = 1.01 * float(torch.linalg.vector_norm(shift))
        packed = packed_columns(self.columns, bias - offsets @ shift, self.dtype)
        dim, unit = offsets.shape[1], ROUNDOFF[self.dtype]
        lost = (offsets - packed[:dim].T.double()).square().sum(1).max().sqrt()
        self.packed = with_losers(packed, dim)
        # of a product, for a row of length one
        error = 1.01 * (unit + 2 * dim * U32) * self.reach + 1.01 * float(lost)
        reach = self.reach + away
        self._bounds = error, 8 * U32 * self.reach * reach + FAINT, (dim + 4) * U32, reach, unit

    def __call__(self, rows: Float32[Tensor, "m d"]) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of every row."""

        def take(places: Tensor) -> Tensor:
            return rows.index_select(0, places)  # 4 times as fast as rows[places]

        return self.search(self.pack(rows), take)

    def pack(self, rows: Float32[Tensor, "m d"]) -> Packed:
        """Return rows as `search` wants them."""
        return pack(rows, self.origin, self.width, self.dtype)

    def search(self, packed: Packed, take: Take) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of packed rows; `take` reads those that are left open."""
        tile, lengths = packed
        scores = self._space(len(tile))
        torch.mm(tile, self.packed, out=scores)
        whole = scores.view(INTEGER[self.dtype]).numpy()
        nearest, open_rows, left = self._guess(whole, lengths.numpy())
        self._compare(take, open_rows, nearest)
        return self._settle(nearest, torch.from_numpy(left), take)

    def _guess(
        self, scores: np.ndarray, lengths: np.ndarray
    ) -> tuple[Int64[np.ndarray, " m"], Candidates, Int64[np.ndarray, " u"]]:
        """Return the best column of each row, the rows with more than one, and those left open.

        Few scores of 32 bits are looked at by their keys first.
        """
        bounds = self._bounds
        if self.dtype != torch.float32 or scores.shape[1] > KEYED:
            floors = loops().floors_of(scores, lengths, bounds)
            nearest, rows, starts, ids, left = loops().above(scores, floors, CROWD)
            return nearest, (rows, starts, ids), left
        nearest, where = loops().best_columns(scores, lengths, bounds)
        some = scores[where]
        floors = loops().floors_of(some, lengths[where], bounds)
        nearest[where], rows, starts, ids, left = loops().above(some, floors, CROWD)
        return nearest, (where[rows], starts, ids), where[left]

    def _settle(self, nearest: np.ndarray, left: Tensor, take: Take) -> Int64[Tensor, " m"]:
        """Return the nearest of a tile's rows, those in `left` decided by float32 scores.

        0 where distances overflow.
        """
        k = len(self.centroids)
        for part in torch.split(left, min(256, max(1, SCORES // k))):
            if not len(part):
                continue
            scores, lowest = self._score(take(part))
            places = part.numpy()
            found = loops().above(scores.numpy(), lowest.numpy(), k)
            nearest[places], rows, starts, ids, _ = found
            self._compare(take, (places[rows], starts, ids), nearest)
        return torch.from_numpy(nearest)

    def _space(self, size: int) -> Tensor:
        """Return a thread's scores of a tile: new memory would cost a fault every 4 KB."""
        kept = self._kept
        if getattr(kept, "size", -1) < size:
            kept.size = size
            kept.scores = torch.empty(size, self.packed.shape[1], dtype=self.dtype)
        scores: Tensor = kept.scores[:size]
        return scores

    def _score(self, rows: Float32[Tensor, "u d"]) -> tuple[Tensor, Tensor]:
        """Return float32 scores of some rows, and the lowest that can be a row's best."""
        centred = rows.sub_(self.mean)
        lengths = torch.linalg.vector_norm(centred, dim=1)
        scores = torch.addmm(self.bias, centred, self.columns)
        product = (2 * rows.shape[1] + 16) * U32 * (self.reach + lengths) ** 2 + FAINT
        return scores, scores.max(1).values - 4 * product

    def _compare(self, take: Take, open_rows: Candidates, out: np.ndarray) -> None:
        """Write the nearest of each row's candidates: at the smallest distance, ties by id."""
        for places, starts, ids in _blocks(*open_rows):
            rows = take(torch.from_numpy(places))
            out[places], certain = loops().closest(
                rows.numpy(), starts, ids, self._plain, self._gap
            )
            if not certain.all():
                self._decide(rows, places, starts, ids, ~certain, out)

    def _decide(
        self,
        rows: Float32[Tensor, "c d"],
        places: np.ndarray,
        starts: np.ndarray,
        ids: np.ndarray,
        which: Bool[np.ndarray, " c"],
        out: np.ndarray,
    ) -> None:
        """Write the nearest of some rows, whose candidates are nearly as far as each other."""
        counts = np.diff(starts)
        chosen, own = which.repeat(counts), np.arange(len(counts)).repeat(counts)
        ids, own = ids[chosen], own[chosen]
        pairs = rows.index_select(0, torch.from_numpy(own))
        distances = squared_distances(pairs, self.centroids, torch.from_numpy(ids)).numpy()
        counts = counts[which]
        least = np.minimum.reduceat(distances, np.r_[0, counts.cumsum()[:-1]])
        # reversed, so that the first of equals is written last
        winners = np.flatnonzero(distances == least.repeat(counts))[::-1]
        out[places[own[winners]]] = ids[winners]


def squared_distances(
    rows: Float32[Tensor, "m d"], centroids: Float32[Tensor, "k d"], ids: Int64[Tensor, " m"]
) -> Float32[Tensor, " m"]:
    """Return |x - c|^2 of every row, by difference: 0 for equals, no cancellation."""
    size = len(rows) if rows.is_cuda else max(1, CACHED // rows.shape[1])
    parts = zip(torch.split(rows, size), torch.split(ids, size), strict=True)
    return torch.cat([centroids.index_select(0, i).sub_(r).square_().sum(1) for r, i in parts])


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


def pack(
    rows: Float32[Tensor, "m d"], origin: Float32[Tensor, " d"], width: int, dtype: torch.dtype
) -> Packed:
    """Return rows packed for a product, and a bound of their lengths."""
    tile = packed_rows(rows, origin, width, dtype)
    lengths = torch.linalg.vector_norm(tile[:, : rows.shape[1]], dim=1, dtype=torch.float32)
    return tile, 1.01 * lengths


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


def with_losers(packed: Tensor, dim: int) -> Tensor:
    """Return packed columns with more behind them, up to a multiple of 8, that no row can choose.

    A product of 16 columns takes a quarter of the time of one of 10 by MKL, and 304 less than 300.
    """
    more = torch.zeros(len(packed), -packed.shape[1] % AT_ONCE, dtype=packed.dtype)
    more[dim] = LOSING  # times the rows' ones
    return torch.cat([packed, more], 1)


def packed_rows(
    rows: Float32[Tensor, "m d"], origin: Float32[Tensor, " d"], width: int, dtype: torch.dtype
) -> Tensor:
    """Return rows - origin for a product with packed columns: of this type, then ones."""
    dim = rows.shape[1]
    tile = torch.empty(len(rows), width, dtype=dtype, device=rows.device)
    torch.sub(rows, origin, out=tile[:, :dim])
    tile[:, dim : dim + 3] = 1
    tile[:, dim + 3 :] = 0
    return tile


def loops() -> ModuleType:
    """Return the compiled loops: a rank that does not cluster need not wait for Numba."""
    from deepclust.clustering import compiled

    return compiled


def _blocks(rows: np.ndarray, starts: np.ndarray, ids: np.ndarray) -> Iterator[Candidates]:
    """Cut rows and their candidates into stretches of about PAIRS candidates."""
    first = 0
    while first < len(rows):
        last = int(np.searchsorted(starts, starts[first] + PAIRS, side="right")) - 1
        last = max(first + 1, last)
        begin, end = starts[first], starts[last]
        yield rows[first:last], starts[first : last + 1] - begin, ids[begin:end]
        first = last


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
