"""Loops over scores and rows, compiled by Numba: what NumPy and torch would do in ten passes.

With few centroids the product of a search is cheap, and what follows it decides the time. Here each
row is looked at once, while it is in the cache. The loops hold no lock of Python, so threads run
side by side. Numba compiles them at their first call, and keeps the result beside this file or in
the user's cache. That is some seconds, once for an installation. What they are worth is measured by
`tools/bench/clustering` (kmeans-cpu, kmeans-grid).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
TINY = 1e-36  # squares below may have lost their digits
BLOCK = 128  # scores that are looked at together
LOWEST = np.int32(-(2**31))
# sums may be made in another order, which SIMD needs; not a number and infinity stay what they are
ANY_ORDER = {"reassoc", "contract", "nsz"}


def compiled(any_order: bool = False) -> Callable[[F], F]:
    """Compile a function by Numba at its first call."""

    def decorate(function: F) -> F:
        fast = ANY_ORDER if any_order else False
        try:
            done: Any = numba.njit(nogil=True, cache=True, fastmath=fast)(function)
        except RuntimeError:  # neither folder can be written: each process compiles for itself
            done = numba.njit(nogil=True, fastmath=fast)(function)
        return cast("F", done)

    return decorate


@compiled()
def _largest(scores: np.ndarray) -> Any:
    """Return the largest score; a loop from 0 on, for which Numba has SIMD."""
    best = scores[0]
    for column in range(len(scores)):
        best = max(best, scores[column])
    return best


@compiled()
def _floor(top: Any, length: Any, bounds: tuple[float, float, float, float, float]) -> Any:
    """Return the lowest score that can be the best of a row whose highest is `top`.

    bounds: a, b, c, r and u. A score s of a row of length l is at most
    a l + b + c (r + l)^2 + u |s| off.
    """
    scale, constant, quadratic, reach, unit = bounds
    error = scale * length + constant + quadratic * (reach + length) ** 2
    return np.float32(top - 2.02 * (error + unit * abs(top)))


@compiled()
def floors_of(
    scores: np.ndarray, lengths: np.ndarray, bounds: tuple[float, float, float, float, float]
) -> np.ndarray:
    """Return the lowest score that can be a row's best, for scores [m, k] seen as integers.

    They are bfloat16 as int16 or float32 as int32, which orders positive numbers as their values.
    lengths: of the rows, float32 [m]. bounds: see `_floor`. The highest integer stands for a row
    without a clearly positive best score.
    """
    m = len(scores)
    shift = 32 - 8 * scores.itemsize  # bfloat16 is the upper half of a float32
    floors = np.full(m, np.iinfo(scores.dtype).max, scores.dtype)
    bits = np.zeros(1, np.int32)
    value = bits.view(np.float32)
    for row in range(m):
        best = _largest(scores[row])
        bits[0] = np.int32(best) << shift
        value[0] = _floor(value[0], lengths[row], bounds)
        if value[0] > 0:
            floors[row] = (bits[0] - 1) >> shift  # rounded down, as the float32 may be up
    return floors


@compiled()
def _key(score: Any, high: Any, column: Any) -> Any:
    """Return a score with its column in the low bits; int32, as Numba's `&` makes int64."""
    return np.int32(np.int32(score & high) | column)


@compiled()
def _best_key(scores: np.ndarray, high: Any, columns: np.ndarray) -> Any:
    """Return the largest key of a row."""
    best = LOWEST
    for column in range(len(scores)):
        best = max(best, _key(scores[column], high, columns[column]))
    return best


@compiled()
def _second_key(scores: np.ndarray, high: Any, columns: np.ndarray, best: Any) -> Any:
    """Return the largest key of a row that is not the best."""
    second = LOWEST
    for column in range(len(scores)):
        key = _key(scores[column], high, columns[column])
        second = max(second, LOWEST if key == best else key)
    return second


@compiled()
def best_columns(
    scores: np.ndarray, lengths: np.ndarray, bounds: tuple[float, float, float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best column of each row, and the rows where another one may be: int64 [m], [o].

    scores: float32 [m, k] as int32, and the rest as for `floors_of`. A key is a score with its
    column in place of the low bits. So the largest key tells the best score and its column at once,
    by SIMD. The floor is that of the best score without those bits. A row is open if the second
    best could reach it with all of them.
    """
    m, k = scores.shape
    low = np.int32(2 ** np.ceil(np.log2(k)) - 1)
    high, columns = np.int32(~low), np.arange(k).astype(np.int32)
    nearest, rows, count = np.empty(m, np.int64), np.empty(m, np.int64), 0
    bits = np.zeros(1, np.int32)
    value = bits.view(np.float32)
    for row in range(m):
        best = _best_key(scores[row], high, columns)
        second = _second_key(scores[row], high, columns, best)
        nearest[row] = best & low
        bits[0] = best & high
        value[0] = _floor(value[0], lengths[row], bounds)
        if not (value[0] > 0 and (second | low) < bits[0] - 1):
            rows[count] = row
            count += 1
    return nearest, rows[:count]


@compiled()
def above(
    scores: np.ndarray, floors: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return which of the scores [m, k] of a row are not below its floor.

    Five arrays int64 are returned. [m]: the only one of each row, or 0. [c]: the rows with 2 to
    `most`. [c + 1] and [p]: where theirs begin, and these in order. [u]: the rows with more or
    none.
    """
    m, k = scores.shape
    nearest, found = np.zeros(m, np.int64), np.empty(most, np.int64)
    rows, starts, rest = np.empty(m, np.int64), np.zeros(m + 1, np.int64), np.empty(m, np.int64)
    ids = np.empty(m * 2, np.int64)
    several = left = total = 0
    for row in range(m):
        floor, count = floors[row], 0
        for start in range(0, k, BLOCK):
            block = scores[row, start : start + BLOCK]
            if _largest(block) >= floor:  # few blocks have one
                for column in range(len(block)):
                    if block[column] >= floor:
                        if count < most:
                            found[count] = start + column
                        count += 1
        if count == 1:
            nearest[row] = found[0]
        elif count == 0 or count > most:
            rest[left] = row
            left += 1
        else:
            while total + count > len(ids):
                ids = np.concatenate((ids, np.empty_like(ids)))
            ids[total : total + count] = found[:count]
            total += count
            rows[several] = row
            several += 1
            starts[several] = total
    return nearest, rows[:several], starts[: several + 1], ids[:total], rest[:left]


@compiled(any_order=True)
def closest(
    rows: np.ndarray, starts: np.ndarray, ids: np.ndarray, centroids: np.ndarray, gap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the closest of each row's candidates, int64 [c], and whether that is certain.

    rows: float32 [c, d]. starts, ids: as `above` has them. It is certain where the second one
    is farther by more than the share `gap`, which bounds the rounding of any order of the sums.
    """
    count, dim = rows.shape
    winners, certain = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    for row in range(count):
        best, second, winner = np.float32(np.inf), np.float32(np.inf), ids[starts[row]]
        for place in range(starts[row], starts[row + 1]):
            distance = np.float32(0)
            for column in range(dim):
                offset = rows[row, column] - centroids[ids[place], column]
                distance += offset * offset
            if distance < best:
                best, second, winner = distance, best, ids[place]
            elif distance < second:
                second = distance
        winners[row] = winner
        certain[row] = second - best > gap * second + TINY
    return winners, certain


@compiled()
def add_rows(
    partials: np.ndarray,
    magic: tuple[float, float],
    clusters: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray | None,
    before: np.ndarray | None,
) -> None:
    """Add rows float32 [m, d] to sums float64 [2, k, d] in place, rounded to their two grids.

    magic: 1.5 * 2^52 times each grid (`exact_sums.on_grid`). weights: float64 [m]. before: int64
    [m], clusters whose sums the rows are taken off.
    """
    first, second = magic
    for row in range(len(rows)):
        own = clusters[row]
        for column in range(rows.shape[1]):
            value = np.float64(rows[row, column])
            if weights is not None:
                value *= weights[row]
            coarse = (value + first) - first
            fine = ((value - coarse) + second) - second
            partials[0, own, column] += coarse
            partials[1, own, column] += fine
            if before is not None:
                partials[0, before[row], column] -= coarse
                partials[1, before[row], column] -= fine
