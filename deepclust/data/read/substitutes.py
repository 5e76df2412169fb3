"""Which sample takes the place of one that cannot be read: one that is as like it as can be.

A labelled sample is replaced by another of its class, so that a batch keeps its share of labels.
Others are replaced by a member of their cluster, or by any sample where there are no clusters.
Candidates without a label are tried first for them. Draws depend on the request's key and the
position alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64

from deepclust.data.images.draws import uniform
from deepclust.data.shards.index import Index
from deepclust.world import derive

TRIES = 8  # samples of each kind that are tried


@dataclass(frozen=True)
class Labels:
    """The class of some samples, by ascending sample id."""

    sample_ids: Int64[np.ndarray, " m"]
    classes: Int32[np.ndarray, " m"]

    def of(self, sample_ids: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """Return the class of every sample, -1 where it has none."""
        labels = np.full(len(sample_ids), -1, np.int64)
        if len(self.sample_ids) == 0:
            return labels
        at = np.searchsorted(self.sample_ids, sample_ids).clip(max=len(self.sample_ids) - 1)
        known = self.sample_ids[at] == sample_ids
        labels[known] = self.classes[at[known]]
        return labels


class Substitutes:
    """The candidates for a place, in the order in which they are tried."""

    def __init__(self, index: Index, labels: Labels | None = None) -> None:
        self.index, self.labels = index, labels
        self._clusters: tuple[Path, Int32[np.ndarray, " n"]] | None = None

    def of(
        self, sample_id: int, key: int, position: int, assignments: Path | None
    ) -> Iterator[int]:
        """Yield candidates for the place of a sample, never the sample itself."""
        numbers = uniform(derive(key, "replacement"), np.array([position]), 2 * TRIES)
        u = numbers.reshape(2, TRIES)
        others = self._any(sample_id, u) if assignments is None else self._members(
            sample_id, u, self._assignments(assignments)
        )  # fmt: skip
        if self.labels is None:
            yield from others
            return
        label = int(self.labels.of(np.array([sample_id]))[0])
        if label >= 0:
            alike = self.labels.sample_ids[self.labels.classes == label]
            yield from _drawn(alike, sample_id, u[0])
        candidates = list(others)
        known = self.labels.of(np.array(candidates, np.int64)) >= 0
        yield from (candidates[i] for i in np.argsort(known != (label >= 0), kind="stable"))

    def _any(self, sample_id: int, u: Float64[np.ndarray, "2 m"]) -> Iterator[int]:
        """Yield samples that the index does not exclude, one for each number in [0, 1)."""
        excluded = np.sort(np.array(list(self.index.excluded), np.int64))
        ranks = (u.ravel() * (len(self.index) - len(excluded))).astype(np.int64)
        before = excluded - np.arange(len(excluded))  # readable samples before each
        ids = ranks + np.searchsorted(before, ranks, side="right")
        yield from (i for i in ids.tolist() if i != sample_id)

    def _members(
        self, sample_id: int, u: Float64[np.ndarray, "2 m"], clusters: Int32[np.ndarray, " n"]
    ) -> Iterator[int]:
        """Yield members of the sample's cluster, then any samples that have one."""
        same = clusters == clusters[sample_id]
        for members, numbers in ((same, u[0]), (np.True_, u[1])):
            yield from _drawn(np.flatnonzero(members & (clusters >= 0)), sample_id, numbers)

    def _assignments(self, path: Path) -> Int32[np.ndarray, " n"]:
        """Return the assignments of a file (head 0), mapped once."""
        if self._clusters is None or self._clusters[0] != path:
            stored: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
            self._clusters = path, stored if stored.ndim == 1 else stored[0]
        return self._clusters[1]


def _drawn(
    choices: Int64[np.ndarray, " n"], sample_id: int, numbers: Float64[np.ndarray, " m"]
) -> Iterator[int]:
    """Yield a choice for each number in [0, 1), if there are some but the sample itself."""
    choices = choices[choices != sample_id]
    if len(choices):
        yield from choices[(numbers * len(choices)).astype(np.int64)].tolist()
