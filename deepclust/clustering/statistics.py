"""Statistics of assignments, and their agreement with the last round's or with classes.

Everything is computed from a sparse contingency table, 1.28M samples x 10,000 clusters in about a
second. NMI is normalised by the geometric mean of the entropies, as in DeepCluster (section 4.1);
scikit-learn uses the arithmetic one. It is not adjusted for chance and grows with k, so the
ARI is given with it. Samples with a negative id on either side are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy  # imports its parts when they are used
import scipy.sparse as sparse
from jaxtyping import Bool, Int, Int64

from deepclust.clustering.match_ids import (
    BLOCK,
    Matching,
    contingency,
    hungarian,
    match,
    match_table,
)

__all__ = ["Matching", "accuracy", "ari", "contingency", "describe", "entropy", "match", "nmi"]
__all__ += ["reassigned"]

DENSE = 2**24  # cells of a table of counts that is matched as a dense one, 128 MiB


def describe(
    assignments: Int[np.ndarray, " n"],
    k: int,
    previous: Int[np.ndarray, " n"] | None = None,
    classes: Int[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    """Return the statistics of one head's assignments (-1 = excluded), as written into a round.

    `entropy` (nats) is that of the sizes, `entropy_ratio` its share of ln k. `reassigned` is the
    share of samples that changed cluster since `previous` after the ids were matched. What cannot
    be known (no previous round, no class labels) is None.
    """
    sizes = sizes_of(assignments, k)
    valid = int(sizes.sum())
    moved = None if previous is None else contingency(assignments, np.asarray(previous), (k, k))
    nats = entropy(sizes)
    return {
        "k": k,
        "n": len(assignments),
        "excluded": len(assignments) - valid,
        "sizes": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
        },
        "entropy": nats,
        "entropy_ratio": float(nats / np.log(k)) if k > 1 else 1.0,
        "largest_share": float(sizes.max() / max(valid, 1)),
        "reassigned": None if moved is None else _moved_share(moved),
        "nmi_previous": None if moved is None else _nmi(moved.T.tocsr()),
        **_agreement(assignments, classes),
    }


def sizes_of(assignments: Int[np.ndarray, " n"], k: int) -> Int64[np.ndarray, " k"]:
    """Return the number of samples of each cluster, read in blocks: -1 is none."""
    sizes = np.zeros(k, np.int64)
    for start in range(0, len(assignments), BLOCK):
        block = assignments[start : start + BLOCK]
        sizes += np.bincount(block[block >= 0], minlength=k)
    return sizes


def _agreement(
    assignments: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"] | None
) -> dict[str, float | None]:
    table = None if classes is None else contingency(assignments, classes)
    if table is None or table.nnz == 0:
        return {"nmi_labels": None, "ari_labels": None, "accuracy_labels": None}
    accurate = _share(table, *_matched(table))
    return {"nmi_labels": _nmi(table), "ari_labels": _ari(table), "accuracy_labels": accurate}


def entropy(sizes: Int[np.ndarray, " k"]) -> float:
    """Return the entropy in nats of the shares of these sizes, or 0 for no samples."""
    shares = sizes[sizes > 0] / max(sizes.sum(), 1)
    return float(-(shares * np.log(shares)).sum()) + 0.0  # + 0.0: not -0.0


def nmi(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """Return mutual information over sqrt(H(a) H(b)), in [0, 1]; two constant labelings: 1."""
    return _nmi(contingency(np.asarray(a), np.asarray(b)))


def _nmi(table: sparse.csr_array) -> float:
    """Return the NMI of a table of counts."""
    h_a, h_b = entropy(table.sum(1)), entropy(table.sum(0))
    if h_a == 0 or h_b == 0:
        return float(h_a == h_b)
    information = h_a + h_b - entropy(table.data)
    return float(np.clip(information / np.sqrt(h_a * h_b), 0, 1))


def ari(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """Return the adjusted Rand index (Hubert and Arabie 1985): 0 by chance, 1 for equal ones."""
    return _ari(contingency(np.asarray(a), np.asarray(b)))


def _ari(table: sparse.csr_array) -> float:
    """Return the ARI of a table of counts."""
    both, in_a, in_b = (_pairs(x) for x in (table.data, table.sum(1), table.sum(0)))
    everything = _pairs(np.array([table.data.sum()]))
    if in_a == in_b == both:
        return 1.0
    expected = in_a * in_b / everything
    return float((both - expected) / ((in_a + in_b) / 2 - expected))


def _pairs(counts: Int[np.ndarray, " m"]) -> float:
    """Return the number of pairs of samples inside groups of these sizes."""
    wide = counts.astype(np.float64)
    return float((wide * (wide - 1)).sum() / 2)


def accuracy(clusters: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"]) -> float:
    """Return the share of samples in the cluster of their class, matched one to one.

    The best matching is found by the Hungarian method. With more clusters than classes, the
    samples of clusters that stay without a class count as wrong.
    """
    table = contingency(np.asarray(clusters), np.asarray(classes))
    return _share(table, *_matched(table))


def match_classes(
    clusters: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Return which samples, none excluded, are in the cluster of their class: see `accuracy`."""
    (known, a), (_, b) = (np.unique(ids, return_inverse=True) for ids in (clusters, classes))
    partners = np.full(len(known), -1)
    rows, columns = _matched(contingency(a, b))
    partners[rows] = columns
    matched: Bool[np.ndarray, " n"] = partners[a] == b
    return matched


def _matched(table: sparse.csr_array) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return the pairs of rows and columns whose counts have the greatest sum."""
    if table.shape[0] * table.shape[1] > DENSE:  # as many classes as images, say
        partners = hungarian(table)
        rows = np.flatnonzero(partners >= 0)
        return rows, partners[rows]
    rows, columns = scipy.optimize.linear_sum_assignment(table.toarray(), maximize=True)
    return rows, columns


def reassigned(
    previous: Int[np.ndarray, " n"], current: Int[np.ndarray, " n"], k: int
) -> float | None:
    """Return the share of samples (valid in both) that changed cluster, after matching ids."""
    return _moved_share(contingency(np.asarray(current), np.asarray(previous), (k, k)))


def _moved_share(table: sparse.csr_array) -> float | None:
    """Return the share of samples beside the best matching of a table of current and old ids."""
    if table.nnz == 0:
        return None
    return 1.0 - _share(table, np.arange(table.shape[0]), match_table(table).new_ids)


def _share(table: sparse.csr_array, rows: np.ndarray, columns: np.ndarray) -> float:
    return float(table[rows, columns].sum() / max(table.sum(), 1))
