"""Samples by cluster, and what most of a cluster's samples are: for pages that show clusters."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32, Int64

from deepclust.clustering.match_ids import contingency
from deepclust.run.directory import Run
from deepclust.run.round_files import last_round_before, read_assignments

Shares = tuple[Float64[np.ndarray, " k"], Int64[np.ndarray, " k"]]


class ByCluster:
    """The sample ids of every cluster, the nearest to its centroid first."""

    def __init__(
        self, assignments: Int32[np.ndarray, " n"], distances: Float32[np.ndarray, " n"], k: int = 0
    ) -> None:
        """Sort them; `k` is the least number of clusters, of which some may be empty."""
        self.k = max(k, int(assignments.max(initial=-1)) + 1)
        self.ids: Int64[np.ndarray, " n"] = np.lexsort((distances, assignments))
        self.starts = np.searchsorted(assignments[self.ids], np.arange(self.k + 1))

    @property
    def sizes(self) -> Int64[np.ndarray, " k"]:
        """The samples of each cluster."""
        return np.diff(self.starts)

    def members(self, cluster: int) -> Int64[np.ndarray, " m"]:
        """Return the sample ids of a cluster."""
        return self.ids[self.starts[cluster] : self.starts[cluster + 1]]


def tightness(
    assignments: Int32[np.ndarray, " n"], distances: Float[np.ndarray, " n"], k: int
) -> Float64[np.ndarray, " k"]:
    """Return the mean distance of each cluster's samples to its centroid, NaN of none."""
    known = assignments >= 0
    sizes = np.bincount(assignments[known], minlength=k)
    sums = np.bincount(assignments[known], weights=distances[known], minlength=k)
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)


def majorities(
    labels: Int[np.ndarray, " n"] | None, assignments: Int32[np.ndarray, " n"], k: int
) -> Shares:
    """Return the share of each cluster's most frequent label, and that label.

    Samples without a label (below 0) do not count. A cluster without one has NaN and -1.
    """
    shares, most = np.full(k, np.nan), np.full(k, -1)
    if labels is None or not ((assignments >= 0) & (labels >= 0)).any():
        return shares, most
    table = contingency(assignments, labels, (k, int(labels.max()) + 1))
    totals = table.sum(axis=1)
    known = totals > 0
    shares[known] = table.max(axis=1).toarray().ravel()[known] / totals[known]
    most[known] = table.argmax(axis=1)[known]
    return shares, most


def drift(
    before: Int32[np.ndarray, " n"] | None, assignments: Int32[np.ndarray, " n"], k: int
) -> Float64[np.ndarray, " k"]:
    """Return the share of each cluster's samples that were not in one cluster a round before.

    That one is where most of them were. NaN where nothing is known of the round before.
    """
    return 1 - majorities(before, assignments, k)[0]


def before_of(run: Run, number: int, head: int = 0) -> Int32[np.ndarray, " n"] | None:
    """Return the assignments of the round before, or None where none of that size is there."""
    earlier = last_round_before(run, number)
    every = None if earlier is None else read_assignments(run, earlier)
    same = every is not None and every.shape == read_assignments(run, number).shape
    return every[head] if every is not None and same else None
