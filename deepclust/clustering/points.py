"""Points: what k-means works on.

One pass over the data gives everything an iteration needs.

`kmeans.py` uses this protocol and nothing else. An array in memory, memory-mapped or on a GPU is in
`array_points.py`, since a pass only sees tiles of rows. Rows spread over ranks are in
`sharded_points.py`.

Rows here are those of this process: all n of them unless the points are sharded. Ids are positions
in all n. Sums of a pass are always over all n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from torch import Tensor

Rows: TypeAlias = np.ndarray | Tensor

SAFE = (2.0**-40, 2.0**40)  # lengths whose squares, and those of their parts, float32 holds


@dataclass(frozen=True)
class Assignment:
    """Every point's cluster and the clusters' sums, from one pass, on the points' device."""

    cluster_ids: Int32[Tensor, " rows"]  # nearest centroid, ties to the lowest id
    distances: Float32[Tensor, " rows"]  # squared, by differences (0 = equal); empty if not wanted
    partials: Float64[
        Tensor, "partials k d"
    ]  # weighted sum of each cluster's rows, see `exact_sums.py`
    partial_mass: Float64[Tensor, "partials k"]  # sum of each cluster's weights
    counts: Int64[Tensor, " k"]  # members of each cluster: its rows that weigh more than nothing
    cost: Float64[Tensor, ""]  # weighted sum of the distances; without them from the sums

    @property
    def inertia(self) -> float:
        """The cost as a number, for which the host waits for a GPU."""
        return float(self.cost)

    @property
    def sums(self) -> Float64[Tensor, "k d"]:
        """Weighted sum of each cluster's rows."""
        return self.partials.sum(0)

    @property
    def mass(self) -> Float64[Tensor, " k"]:
        """Sum of each cluster's weights."""
        return self.partial_mass.sum(0)


class Points(Protocol):
    """n rows of `dim` numbers, of which `n_local` are in this process."""

    n: int
    n_local: int
    dim: int
    device: torch.device
    spherical: bool  # rows are scaled to unit norm: spherical k-means

    def configure(self, *, spherical: bool, backend: str) -> Points:
        """Return the same rows, read as unit rows or as they are, searched by `backend`."""

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first rows that hold NaN or infinity."""

    def list_weights(self) -> Float64[np.ndarray, " n"] | None:
        """Return the weights of all n rows, on every rank, or None without weights."""

    def weighs(self) -> Bool[Tensor, " rows"] | None:
        """Return which rows weigh more than nothing, or None where all of them do."""

    def gather(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Return copies of some rows, from whichever rank has them."""

    def select(self, ids: Int64[np.ndarray, " m"]) -> Points:
        """Return a view of some rows (ascending ids).

        Nothing is copied.
        """

    def assign_to(
        self,
        centroids: Float32[Tensor, "k d"],
        before: Assignment | None = None,
        distances: bool = True,
    ) -> Assignment:
        """Assign every point and sum up.

        `before`, an assignment of the points, makes it faster.
        """

    def sum_clusters(self, cluster_ids: Int32[Tensor, " rows"], k: int) -> Assignment:
        """Sum up the rows of given clusters (-1: left out), without distances."""

    def find_farthest(
        self, assignment: Assignment
    ) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Return each cluster's farthest member (ties: lowest id) and its distance; -1: none."""

    def recount(self, assignment: Assignment, cluster_ids: Tensor, distances: Tensor) -> Assignment:
        """Return the assignment with other clusters and distances.

        Its sums stay as they were.
        """

    def locate(self, ids: Int64[Tensor, " m"]) -> tuple[Bool[Tensor, " m"], Int64[Tensor, " h"]]:
        """Return which of these ids are in this process, and at which row."""

    def gather_values(
        self, values: Int32[Tensor, " rows"], ids: Int64[Tensor, " m"]
    ) -> Int32[Tensor, " m"]:
        """Return the values of these ids, from whichever rank has them."""

    def count(self, rows: Bool[Tensor, " rows"]) -> Int64[Tensor, ""]:
        """Return how many rows are marked, over all n."""

    def find_lowest(self, keys: Float32[Tensor, " rows"], m: int) -> tuple[Tensor, Tensor]:
        """Return ids and keys of the m rows of lowest finite key, ascending, ties by id."""


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Scale rows to unit L2 norm, whatever their length.

    A zero row stays zero and is never NaN.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    are_safe = ((norms > SAFE[0]) & (norms < SAFE[1])).all()  # else their squares may be lost
    if rows.is_cuda:  # a look at it would wait for the GPU
        rows = torch.where(are_safe, rows, in_range(rows))
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    elif not bool(are_safe):
        rows = in_range(rows)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def in_range(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Scale very long and very short rows by a power of two, which changes no direction.

    Rows whose largest number is between 2^-40 and 2^40, or not finite, stay as they are.
    """
    top = rows.abs().amax(1, keepdim=True)
    far = torch.isfinite(top) & (top > 0) & ((top < SAFE[0]) | (top > SAFE[1]))
    exponents = torch.where(far, -torch.frexp(top).exponent, 0)
    half = exponents // 2  # in two steps, as 2^149 is not a float32
    return torch.ldexp(torch.ldexp(rows, half), exponents - half)


def as_tensor(values: Rows) -> Tensor:
    """Return a copy of an array as a tensor: torch warns when it shares read-only memory."""
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))


def cost_of(
    sum_sq: Float64[Tensor, ""], assignment: Assignment, centroids: Float32[Tensor, "k d"]
) -> Float64[Tensor, ""]:
    """Return the inertia from sums S and mass m: sum w|x|^2 - 2 sum c.S + sum m|c|^2.

    `sum_sq` is the first term. In float64 it agrees with the sum of distances to ten digits,
    except where rows are much farther from the origin than from each other.
    """
    wide = centroids.double()
    rest = (wide * (assignment.mass[:, None] * wide - 2 * assignment.sums)).sum()
    return torch.where(torch.isfinite(rest), (sum_sq + rest).clamp(min=0.0), torch.nan)


def largest_of(distances: Float32[Tensor, " n"]) -> float:
    """Return the largest distance, or 0 for no rows."""
    return float(distances.max()) if len(distances) else 0.0


def not_finite(first: Int64[np.ndarray, " f"], count: int, n: int) -> str:
    """Return the message for `count` rows with NaN or infinity.

    `first` are some of their ids.
    """
    names = ", ".join(str(row) for row in first[:5]) + (", ..." if count > 5 else "")
    return (
        f"{count} of {n} feature rows are not finite: row {names}. Leave them out "
        "(assignment -1) or look for overflow in the backbone."
    )
