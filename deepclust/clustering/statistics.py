"""Statistics of assignments, and their agreement with the last round's or with classes.

Everything is computed from a sparse contingency table, 1.28M samples x 10,000 clusters in about a
second. NMI is normalised by the geometric mean of the entropies, as in DeepCluster (section 4.1);
scikit-learn uses the arithmetic one. It is not adjusted for chance and grows with k, so the
ARI is given with it. Samples with a negative id on either side are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Bool, Int
from scipy.optimize import linear_sum_assignment

from deepclust.clustering.match_ids import Matching, contingency, hungarian, match

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
    valid = assignments[assignments >= 0]
    sizes = np.bincount(valid, minlength=k)
    nats = entropy(sizes)
    return {
        "k": k,
        "n": len(assignments),
        "excluded": len(assignments) - len(valid),
        "sizes": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
        },
        "entropy": nats,
        "entropy_ratio": float(nats / np.log(k)) if k > 1 else 1.0,
        "largest_share": float(sizes.max() / max(len(valid), 1)),
        "reassigned": None if previous is None else reassigned(previous, assignments, k),
        "nmi_previous": None if previous is None else nmi(previous, assignments),
        **_agreement(assignments, classes),
    }


def _agreement(
    assignments: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"] | None
) -> dict[str, float | None]:
    if classes is None or not ((classes >= 0) & (assignments >= 0)).any():
        return {"nmi_labels": None, "ari_labels": None, "accuracy_labels": None}
    return {
        "nmi_labels": nmi(assignments, classes),
        "ari_labels": ari(assignments, classes),
        "accuracy_labels": accuracy(assignments, classes),
    }


def entropy(sizes: Int[np.ndarray, " k"]) -> float:
    """Return the entropy in nats of the shares of these sizes, or 0 for no samples."""
    shares = sizes[sizes > 0] / max(sizes.sum(), 1)
    return float(-(shares * np.log(shares)).sum()) + 0.0  # + 0.0: not -0.0


def nmi(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """Return mutual information over sqrt(H(a) H(b)), in [0, 1]; two constant labelings: 1."""
    table = contingency(np.asarray(a), np.asarray(b))
    h_a, h_b = entropy(table.sum(1)), entropy(table.sum(0))
    if h_a == 0 or h_b == 0:
        return float(h_a == h_b)
    information = h_a + h_b - entropy(table.data)
    return float(np.clip(information / np.sqrt(h_a * h_b), 0, 1))


def ari(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """Return the adjusted Rand index (Hubert and Arabie 1985): 0 by chance, 1 for equal ones."""
    table = contingency(np.asarray(a), np.asarray(b))
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
    rows, columns = linear_sum_assignment(table.toarray(), maximize=True)
    return rows, columns


def reassigned(
    previous: Int[np.ndarray, " n"], current: Int[np.ndarray, " n"], k: int
) -> float | None:
    """Return the share of samples (valid in both) that changed cluster, after matching ids."""
    table = contingency(np.asarray(current), np.asarray(previous), (k, k))
    if table.nnz == 0:
        return None
    return 1.0 - _share(table, np.arange(k), match(previous, current, k).new_ids)


def _share(table: sparse.csr_array, rows: np.ndarray, columns: np.ndarray) -> float:
    return float(table[rows, columns].sum() / max(table.sum(), 1))
