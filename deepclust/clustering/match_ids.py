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
    size of an id costs nothing.
    """
    both = (rows >= 0) & (columns >= 0)
    a, b = rows[both].astype(np.int64), columns[both].astype(np.int64)
    if shape is None:
        known, a = np.unique(a, return_inverse=True)
        others, b = np.unique(b, return_inverse=True)
        shape = (len(known), len(others))
    table = sparse.coo_array((np.ones(len(a), np.int64), (a, b)), shape=shape)
    return table.tocsr()  # sums what occurs more than once


def match(previous: Int[np.ndarray, " n"], current: Int[np.ndarray, " n"], k: int) -> Matching:
    """Return the renumbering of `current` (ids below k, -1 excluded) closest to `previous`.

    Exact (Hungarian) up to 20,000 clusters, above greedy by overlap, which is at least half as
    good. Clusters without overlap take the ids that are left, in ascending order.
    """
    table = contingency(np.asarray(current), np.asarray(previous), (k, k))
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
