"""Points: what k-means works on. One pass over the data gives everything an iteration needs.

`kmeans.py` knows this protocol and nothing else. An array in memory, memory-mapped or on a GPU is
`arrays.py`, since a pass only ever sees tiles of rows; rows spread over ranks are `sharded.py`.

Rows here are those that this process holds, all n of them unless the points are sharded; ids are
positions in all n. What a pass sums up is always over all n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from torch import Tensor

Rows: TypeAlias = np.ndarray | Tensor


@dataclass(frozen=True)
class Pass:
    """One look at all points with given centroids; on the points' device."""

    labels: Int32[Tensor, " rows"]  # nearest centroid, ties to the lowest id
    distances: Float32[Tensor, " rows"]  # squared, by differences (0 = equal); empty if not asked
    bins: Float64[Tensor, "bins k d"]  # weighted sum of each cluster's rows, see `exact.py`
    weights: Float64[Tensor, "bins k"]  # sum of each cluster's weights
    counts: Int64[Tensor, " k"]  # number of rows of each cluster
    inertia: float  # weighted sum of the distances, in float64; without them from the sums

    @property
    def sums(self) -> Float64[Tensor, "k d"]:
        """Weighted sum of each cluster's rows."""
        return self.bins.sum(0)

    @property
    def mass(self) -> Float64[Tensor, " k"]:
        """Sum of each cluster's weights."""
        return self.weights.sum(0)


class Points(Protocol):
    """n rows of `dim` numbers, of which this process holds `held`."""

    n: int
    held: int
    dim: int
    device: torch.device
    unit: bool  # rows are scaled to unit norm: spherical k-means

    def configured(self, *, unit: bool, backend: str) -> Points:
        """The same rows, read as unit rows or as they are, searched by `backend`."""

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first rows that hold NaN or infinity."""

    def take(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Copies of some rows, wherever they are."""

    def select(self, ids: Int64[np.ndarray, " m"]) -> Points:
        """A view of some rows (ascending ids), for the second level; nothing is copied."""

    def visit(
        self, centroids: Float32[Tensor, "k d"], before: Pass | None = None, distances: bool = True
    ) -> Pass:
        """Assign every point, and sum up; `before`, a pass over these points, makes it faster."""

    def total(self, labels: Int32[Tensor, " rows"], k: int) -> Pass:
        """Sums of given labels (-1: left out), without distances; for a warm start."""

    def farthest(self, found: Pass) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Each cluster's farthest member (lowest id of equals) and its distance; -1 if none."""

    def recount(self, found: Pass, labels: Tensor, distances: Tensor) -> Pass:
        """The pass with other labels and distances: counts and inertia anew, sums left as is."""

    def holds(self, ids: Int64[Tensor, " m"]) -> tuple[Bool[Tensor, " m"], Int64[Tensor, " h"]]:
        """Which of these ids are held here, and at which row."""

    def at(self, values: Int32[Tensor, " rows"], ids: Int64[Tensor, " m"]) -> Int32[Tensor, " m"]:
        """The values of these ids, wherever they are held."""

    def count(self, rows: Bool[Tensor, " rows"]) -> int:
        """How many rows are marked, over all n."""

    def lowest(self, keys: Float32[Tensor, " rows"], m: int) -> tuple[Tensor, Tensor]:
        """Ids and keys of the m rows of lowest finite key, ascending, the lower id first."""


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to unit L2 norm; a zero row stays zero and is never NaN."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def as_tensor(values: Rows) -> Tensor:
    """A tensor of an array, copied: torch warns about sharing memory that is read-only."""
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))


def inertia_of(power: float, found: Pass, centroids: Float32[Tensor, "k d"]) -> float:
    """The inertia without distances: sum w|x|^2 - 2 sum c.S + sum m|c|^2, S and m of each cluster.

    `power` is the first term. In float64 it agrees with the sum of distances to about ten digits
    unless the rows are much farther from the origin than from each other.
    """
    wide = centroids.double()
    rest = (wide * (found.mass[:, None] * wide - 2 * found.sums)).sum()
    return max(power + float(rest), 0.0) if np.isfinite(float(rest)) else float("nan")


def largest_of(distances: Float32[Tensor, " n"]) -> float:
    """The largest distance; 0 for no rows."""
    return float(distances.max()) if len(distances) else 0.0


def not_finite(first: Int64[np.ndarray, " f"], count: int, n: int) -> str:
    """The message for `count` rows that hold NaN or infinity; `first` are some of their ids."""
    names = ", ".join(str(row) for row in first[:5]) + (", ..." if count > 5 else "")
    return (
        f"{count} of {n} feature rows are not finite: row {names}. Leave them out "
        "(assignment -1) or look for overflow in the backbone."
    )
