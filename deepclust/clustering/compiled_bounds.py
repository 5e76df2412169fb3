"""A pass of k-means over packed rows, compiled by Numba: bounds, products and what follows them.

See `bounds.py` for the method. A block of rows is read once and stays in a core's cache for all
that is done with it. The loops hold no lock of Python. Products are those of SciPy's BLAS, which
Numba calls. Bounds are float32 and are rounded outwards: `near` up, `far` down.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deepclust.clustering.compiled import LOWEST, compiled
from deepclust.clustering.nearest import FAINT

BLOCK = 256  # rows of a product, as in scikit-learn's k-means
SCORES = 2**21  # numbers of a product, at most
UP, DOWN = 1 + 2.0**-22, 1 - 2.0**-22  # more than the rounding of a float32
NOTHING = FAINT**0.5  # less than this apart is not apart: squares would lose their digits
FARTHEST = 1e18  # longer rows are left to the full search: squares come near float32's largest
LOSING = np.float32(-1e38)  # a score that is never the best
STRETCH = 1.01  # lengths of packed rows are so much too long
KEYED = 4096  # scores of a row, at most, whose columns may take the low bits
EXTRA = 8  # columns that a search among all costs beside its product


class Facts(NamedTuple):
    """What bounds rest on.

    A distance in float32, of a row of length l, is right within the shares `margin` - 1 of itself
    and `slack` of l + `reach`. Two that differ by more are not confused. A score is right within
    the share `share` of (l + reach)^2, and `FAINT` for numbers too small for float32.
    """

    dim: int
    margin: float
    slack: float
    reach: float  # the longest centroid, about the origin of packed rows
    share: float


class Centroids(NamedTuple):
    """The centroids of a pass, those that moved most first."""

    packed: np.ndarray  # float32 [k, w]: f, and -|f|^2 / 2 in three parts; f is about the origin
    order: np.ndarray  # int64 [k]: their ids
    places: np.ndarray  # int64 [k]: where each id is
    drifts: np.ndarray  # float64 [k]: how far they moved, descending
    choices: np.ndarray  # int64: how many of them a row may be compared with first


class Known(NamedTuple):
    """Packed rows, and what is known of them."""

    rows: np.ndarray  # float32 [m, w]
    lengths: np.ndarray  # float32 [m], up to a hundredth too long
    own: np.ndarray  # int32 [m]: the centroid before, or empty
    near: np.ndarray  # float32 [m]: at most so far is the own one
    far: np.ndarray  # float32 [m]: at least so far is any other


@compiled(any_order=True)
def pack(rows: np.ndarray, origin: np.ndarray, out: np.ndarray, lengths: np.ndarray) -> None:
    """Write rows - origin for a product with packed centroids, and bounds of their lengths.

    rows: float32 [m, d]. out: float32 [m, w], of which three columns are 1 and the rest 0.
    """
    dim = rows.shape[1]
    for row in range(len(rows)):
        total = np.float32(0)
        for column in range(dim):
            offset = rows[row, column] - origin[column]
            out[row, column] = offset
            total += offset * offset
        out[row, dim : dim + 3] = 1
        out[row, dim + 3 :] = 0
        lengths[row] = np.float32(STRETCH) * np.sqrt(total)


@compiled(any_order=True)
def _apart(row: np.ndarray, centroid: np.ndarray, dim: int) -> Any:
    """Return the distance of a packed row to a packed centroid."""
    total = np.float32(0)
    for column in range(dim):
        offset = row[column] - centroid[column]
        total += offset * offset
    return np.sqrt(np.float64(total))


@compiled()
def _ordered(bits: Any) -> Any:
    """Return an integer that orders float32 numbers, given by their bits, as their values."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled()
def _best(scores: np.ndarray) -> Any:
    """Return the largest score of a row, as an ordered integer."""
    best = LOWEST
    for column in range(len(scores)):
        best = max(best, _ordered(scores[column]))
    return best


@compiled()
def _key(score: Any, high: Any, column: Any) -> Any:
    """Return an ordered score with its column in the low bits."""
    return np.int32(np.int32(_ordered(score) & high) | column)


@compiled()
def _best_two(scores: np.ndarray, high: Any, columns: np.ndarray) -> tuple[Any, Any]:
    """Return the two largest keys of a row."""
    best = LOWEST
    for column in range(len(scores)):
        best = max(best, _key(scores[column], high, columns[column]))
    second = LOWEST
    for column in range(len(scores)):
        key = _key(scores[column], high, columns[column])
        second = max(second, LOWEST if key == best else key)
    return best, second


@compiled()
def _first_two(scores: np.ndarray) -> tuple[Any, Any, Any]:
    """Return a place of the best score, that score, and the best at another place."""
    best, place = _best(scores), 0
    for column in range(len(scores)):
        if _ordered(scores[column]) == best:
            place = column
            break
    second = LOWEST
    for column in range(len(scores)):
        second = max(second, LOWEST if column == place else _ordered(scores[column]))
    return place, best, second


@compiled()
def _value(ordered: Any, bits: np.ndarray, value: np.ndarray) -> Any:
    """Return the score of an ordered integer; `value` sees the memory of `bits`."""
    bits[0] = _ordered(ordered)
    return np.float64(value[0])


@compiled()
def _gather(rows: np.ndarray, where: np.ndarray, space: np.ndarray) -> np.ndarray:
    """Return some rows of a block, copied; all of them as they are."""
    if len(where) == len(rows):
        return rows
    for one in range(len(where)):
        row = where[one]
        for column in range(rows.shape[1]):
            space[one, column] = rows[row, column]
    return space[: len(where)]


@compiled()
def _open(known: Known, centroids: Centroids, facts: Facts, gaps: np.ndarray) -> None:
    """Move the bounds of a block by the drifts, in place, and write how much each row's differ.

    Infinity stands for a row that keeps its centroid. Of others `near` is measured again, and
    `far` is not moved yet.
    """
    near, far, drifts = known.near, known.far, centroids.drifts
    for row in range(len(near)):
        place = centroids.places[known.own[row]]
        step = drifts[0] if place > 0 or len(drifts) == 1 else drifts[1]
        below, above = far[row] - step, near[row] + drifts[place]
        if not above < min(below, FARTHEST):
            distance = _apart(known.rows[row], centroids.packed[place], facts.dim)
            off = facts.slack * (known.lengths[row] + facts.reach) + NOTHING
            near[row] = (distance * facts.margin + off) * UP
            if not near[row] < min(below, FARTHEST):
                gap = far[row] - near[row]
                gaps[row] = gap if gap < np.inf else 0  # also where it is not a number
                continue
            above = np.float64(near[row])
        near[row], far[row], gaps[row] = above * UP, below * DOWN, np.inf


@compiled()
def _choose(gaps: np.ndarray, centroids: Centroids) -> Any:
    """Return with how many columns open rows are compared first (0: with all) at the least cost."""
    k, opened = len(centroids.drifts), 0
    for row in range(len(gaps)):
        opened += gaps[row] < np.inf
    best, least = 0, opened * (k + EXTRA)
    for columns in centroids.choices:
        moved, full = centroids.drifts[columns], 0
        for row in range(len(gaps)):
            full += not gaps[row] > moved
        cost = full * (k + EXTRA) + (opened - full) * (columns + 2)
        if cost < least:
            best, least = columns, cost
    return best


@compiled()
def _compare(
    scores: np.ndarray,
    where: np.ndarray,
    known: Known,
    centroids: Centroids,
    facts: Facts,
    gaps: np.ndarray,
    seen: tuple[np.ndarray, np.ndarray],
) -> None:
    """Move `far` of rows by their scores for the columns that moved most; in doubt their gap is 0.

    scores: float32 [c, columns], of the rows `where`. No other centroid moved as far.
    """
    near, far, columns = known.near, known.far, scores.shape[1]
    bits, moved = scores.view(np.int32), centroids.drifts[columns]
    for one in range(len(where)):
        row = where[one]
        place = centroids.places[known.own[row]]
        if place < columns:
            scores[one, place] = LOSING
        length = np.float64(known.lengths[row])
        best = _value(_best(bits[one]), seen[0], seen[1])
        error = facts.share * (length + facts.reach) ** 2 + FAINT
        square = (length / STRETCH) ** 2 * (2 - facts.margin) - 2 * (best + error)
        below = min(far[row] - moved, np.sqrt(max(square, 0.0))) * DOWN
        if square > 0 and near[row] < below and length + facts.reach < FARTHEST:
            far[row], gaps[row] = below, np.inf
        else:
            gaps[row] = 0


@compiled()
def _closest(
    scores: np.ndarray, floor: float, row: np.ndarray, centroids: np.ndarray, dim: int
) -> tuple[Any, Any, Any]:
    """Return the place of the closest of a row's candidates, its distance and the second one's."""
    best, second, place = np.inf, np.inf, 0
    for column in range(len(scores)):
        if scores[column] >= floor:
            distance = _apart(row, centroids[column], dim)
            if distance < best:
                best, second, place = distance, best, column
            elif distance < second:
                second = distance
    return place, best, second


@compiled()
def _decide(
    scores: np.ndarray,
    where: np.ndarray,
    known: Known,
    centroids: Centroids,
    facts: Facts,
    seen: tuple[np.ndarray, np.ndarray],
    nearest: np.ndarray,
) -> None:
    """Write the nearest centroid of rows by their scores, and new bounds; -1 is left to others.

    scores: float32 [c, k], of the rows `where`. The square of the distance to another centroid is
    that to the own one and twice what the scores differ by. Where they differ too little, distances
    decide.
    """
    near, far, packed, dim, margin = (
        known.near,
        known.far,
        centroids.packed,
        facts.dim,
        facts.margin,
    )
    bits, k = scores.view(np.int32), scores.shape[1]
    low = np.int32(2 ** np.ceil(np.log2(k)) - 1)
    high, columns = np.int32(~low), np.arange(k).astype(np.int32)
    for one in range(len(where)):
        row = where[one]
        if k <= KEYED:
            top, second = _best_two(bits[one], high, columns)
            place = top & low
            top, second = top & high, second | low
        else:
            place, top, second = _first_two(bits[one])
        highest, length = _value(top, seen[0], seen[1]), known.lengths[row] + facts.reach
        apart = highest - _value(second, seen[0], seen[1])
        error = 4 * facts.share * length**2 + FAINT  # of both, and what float32 confuses
        off = facts.slack * length + NOTHING
        if apart > error:
            distance, other = _apart(known.rows[row], packed[place], dim), np.inf
        else:
            floor, apart = highest - error, 1.5 * error
            place, distance, other = _closest(scores[one], floor, known.rows[row], packed, dim)
        closer = distance * margin + 2 * off < other * (2 - margin)  # not where it is infinite
        if not (closer and length < FARTHEST):
            nearest[row], near[row], far[row] = -1, np.inf, 0
            continue
        least = max(0.0, distance * (2 - margin) - off)
        rest = np.sqrt(least * least + 2 * (apart - error))
        nearest[row], near[row] = centroids.order[place], (distance * margin + off) * UP
        far[row] = min(rest, other * (2 - margin) - off) * DOWN


@compiled()
def _products(
    known: Known, where: np.ndarray, columns: np.ndarray, space: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the scores of some rows for some columns."""
    scores = space[1][: len(where) * len(columns)].reshape(len(where), len(columns))
    if len(where):
        np.dot(_gather(known.rows, where, space[0]), columns.T, scores)
    return scores


@compiled()
def assign(known: Known, centroids: Centroids, facts: Facts) -> np.ndarray:
    """Return the nearest centroid of every row, int64 [m]; -1 where scores cannot tell.

    Bounds are renewed in place.
    """
    m, k = len(known.rows), len(centroids.packed)
    size = max(1, min(BLOCK, SCORES // k))
    nearest, gaps, bits = np.empty(m, np.int64), np.empty(size, np.float32), np.zeros(1, np.int32)
    space = np.empty((size, known.rows.shape[1]), np.float32), np.empty(size * k, np.float32)
    seen = bits, bits.view(np.float32)
    for start in range(0, m, size):
        mine = slice(start, min(start + size, m))
        block = Known(known.rows[mine], known.lengths[mine], known.own[mine], known.near[mine],
                      known.far[mine])  # fmt: skip
        gap = gaps[: len(block.rows)]
        gap[:] = 0
        if len(known.own):
            nearest[mine] = block.own
            _open(block, centroids, facts, gap)
            columns = _choose(gap, centroids)
            if columns:
                where = np.flatnonzero((gap > centroids.drifts[columns]) & (gap < np.inf))
                scores = _products(block, where, centroids.packed[:columns], space)
                _compare(scores, where, block, centroids, facts, gap, seen)
        where = np.flatnonzero(gap < np.inf)
        scores = _products(block, where, centroids.packed, space)
        _decide(scores, where, block, centroids, facts, seen, nearest[mine])
    return nearest
