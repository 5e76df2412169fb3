"""Match the clusters of this round to those of the last one.

k-means numbers its clusters differently every round. To keep rows of the head, or to count images
that changed cluster, ids are matched by overlap first. The contingency is sparse (at most n
entries), and so is the assignment problem: 10,000 clusters need no 10,000 x 10,000 matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Bool, Int, Int64
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

BLOCK = 2**20  # samples whose pairs are counted at once
EXACT_UP_TO = 20_000  # clusters; above, the Hungarian method takes too long


@dataclass(frozen=True)
class Matching:
    """A one-to-one renumbering of the current clusters."""

    new_ids: Int64[np.ndarray, " k"]  # new id of every current cluster; a permutation
    # by current id: whether it shares a sample with the cluster it continues
    overlapping: Bool[np.ndarray, " k"]


def contingency(
    rows: Int[np.ndarray, " n"],
    columns: Int[np.ndarray, " n"],
    shape: tuple[int, int] | None = None,
) -> sparse.csr_array:
    """Count pairs of ids: sparse int64 [rows, columns], without pairs of a negative id.

    Without a shape there is a row or a column for each id that occurs, in ascending order. So the
    size of an id costs nothing. Samples are read in blocks, and only counts are held.
    """
    a, b, counts = _count_pairs(rows, columns)
    if shape is None:
        known, a = np.unique(a, return_inverse=True)
        others, b = np.unique(b, return_inverse=True)
        shape = (len(known), len(others))
    table = sparse.coo_array((counts, (a, b)), shape=shape)
    return table.tocsr()


def _count_pairs(
    rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Return the different pairs of ids, none negative, in ascending order, and their counts."""
    pairs, counts = np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
    waiting, held = [(pairs, counts)], 0
    for start in range(0, len(rows), BLOCK):
        block = np.stack([one[start : start + BLOCK] for one in (rows, columns)], 1, dtype=np.int64)
        waiting.append(_merged(block[(block >= 0).all(1)]))
        held += len(waiting[-1][0])
        if held > max(BLOCK, 2 * len(waiting[0][0])):  # so that what is merged again is a share
            waiting, held = [_added(waiting)], 0
    pairs, counts = _added(waiting)
    return pairs[:, 0], pairs[:, 1], counts


def _added(
    parts: list[tuple[Int64[np.ndarray, "p 2"], Int64[np.ndarray, " p"]]],
) -> tuple[Int64[np.ndarray, "q 2"], Int64[np.ndarray, " q"]]:
    """Return the pairs of all parts once, with the sums of their counts."""
    return _merged(*(np.concatenate(some) for some in zip(*parts, strict=True)))


def _merged(
    pairs: Int64[np.ndarray, "p 2"], counts: Int64[np.ndarray, " p"] | None = None
) -> tuple[Int64[np.ndarray, "q 2"], Int64[np.ndarray, " q"]]:
    """Return each pair once, in ascending order, with the sum of its counts (1 where none)."""
    order = np.lexsort(pairs.T[::-1])
    pairs = pairs[order]
    first = np.flatnonzero(np.r_[True, (pairs[1:] != pairs[:-1]).any(1)][: len(pairs)])
    if counts is None:
        return pairs[first], np.diff(np.r_[first, len(pairs)])
    sums = np.add.reduceat(counts[order], first) if len(first) else counts
    return pairs[first], sums


def match(previous: Int[np.ndarray, " n"], current: Int[np.ndarray, " n"], k: int) -> Matching:
    """Return the renumbering of `current` (ids below k, -1 excluded) closest to `previous`.

    Exact (Hungarian) up to 20,000 clusters, above greedy by overlap, which is at least half as
    good. Clusters without overlap take the ids that are left, in ascending order.
    """
    return match_table(contingency(np.asarray(current), np.asarray(previous), (k, k)))


def match_table(table: sparse.csr_array) -> Matching:
    """Return the renumbering of rows (current ids) closest to the columns: see `match`."""
    k = table.shape[0]
    partners = hungarian(table) if k <= EXACT_UP_TO else _greedy(table)
    overlapping = partners >= 0
    new_ids = partners.copy()
    new_ids[~overlapping] = np.setdiff1d(np.arange(k), partners[overlapping])
    return Matching(new_ids, overlapping)


def hungarian(table: sparse.csr_array) -> Int64[np.ndarray, " k"]:
    """Return the column of every row with the largest sum of overlaps, -1 without one.

    A private extra column per row makes a full matching possible. One is added to every weight
    (SciPy takes zero for no edge), which adds k to every full matching and so changes none.
    """
    k, width = table.shape
    edges = table.astype(np.float64)
    edges.data += 1
    padded = sparse.hstack([edges, sparse.eye_array(k)], format="csr")
    rows, columns = min_weight_full_bipartite_matching(padded, maximize=True)
    partners = np.full(k, -1, np.int64)
    partners[rows] = np.where(columns < width, columns, -1)
    return partners


def _greedy(table: sparse.csr_array) -> Int64[np.ndarray, " k"]:
    """Choose the largest overlap, strike its row and column, and so on (ties: lowest ids).

    All edges that come first in both their row and their column are taken at once. The matching is
    the same as with one at a time.
    """
    edges = table.tocoo()
    order = np.lexsort((edges.col, edges.row, -edges.data))
    rows, columns = edges.row[order], edges.col[order]
    partners = np.full(table.shape[0], -1, np.int64)
    while len(rows):
        place = np.arange(len(rows))
        first = _first(rows, place) & _first(columns, place)
        partners[rows[first]] = columns[first]
        left = ~(np.isin(rows, rows[first]) | np.isin(columns, columns[first]))
        rows, columns = rows[left], columns[left]
    return partners


def _first(ids: Int[np.ndarray, " e"], place: Int[np.ndarray, " e"]) -> Bool[np.ndarray, " e"]:
    """Return where each id occurs for the first time."""
    best = np.full(int(ids.max()) + 1, len(ids))
    np.minimum.at(best, ids, place)
    first: Bool[np.ndarray, " e"] = best[ids] == place
    return first
