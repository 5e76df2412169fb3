"""Points: what k-means works on. One pass over the data gives everything an iteration needs.

In memory, memory-mapped and on a GPU are one class here, because a pass only ever sees tiles of
rows; FAISS and torch differ in one function, the search for the nearest centroid. `kmeans.py`
knows the protocol and nothing else, so that Points sharded over ranks need no other loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64
from torch import Tensor

from deepclust.clustering.precision import full_precision
from deepclust.clustering.search import SEARCHES, first_of_equals
from deepclust.errors import DataError, NumericalError

Rows: TypeAlias = np.ndarray | Tensor
TILE = {"cpu": 2**21, "cuda": 2**23}  # numbers of a tile, so that it stays in the cache


@dataclass(frozen=True)
class Pass:
    """One look at all points with given centroids; on the points' device."""

    labels: Int32[Tensor, " n"]  # nearest centroid, ties to the lowest id
    distances: Float32[Tensor, " n"]  # squared L2 distance to it, from differences (0 = equal)
    sums: Float64[Tensor, "k d"]  # weighted sum of each cluster's rows
    mass: Float64[Tensor, " k"]  # sum of each cluster's weights
    counts: Int64[Tensor, " k"]  # number of rows of each cluster
    inertia: float  # weighted sum of the distances, in float64


class Points(Protocol):
    """n rows of `dim` numbers. Ids are positions in these points."""

    n: int
    dim: int
    device: torch.device
    unit: bool  # rows are scaled to unit norm: spherical k-means

    def configured(self, *, unit: bool, backend: str) -> Points:
        """The same rows, read as unit rows or as they are, searched by `backend`."""

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first rows that hold NaN or infinity."""

    def take(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Copies of some rows."""

    def select(self, ids: Int64[np.ndarray, " m"]) -> Points:
        """A view of some rows, for the second level; nothing is copied."""

    def visit(self, centroids: Float32[Tensor, "k d"]) -> Pass:
        """Assign every point, and sum up."""

    def total(self, labels: Int32[Tensor, " n"], k: int) -> Pass:
        """Sums of given labels (-1: left out), without distances; for a warm start."""

    def farthest(self, found: Pass) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Each cluster's farthest member (lowest id of equals) and its distance; -1 if none."""

    def weigh(self, distances: Float32[Tensor, " n"]) -> float:
        """Weighted sum of distances in float64: the inertia."""


class ArrayPoints:
    """Points over an array: numpy, memory-mapped (read block by block) or torch, fp16 to fp64.

    `unit=True` scales every row to unit norm as it is read (spherical k-means, inner product).
    """

    def __init__(
        self,
        rows: Rows,
        *,
        weights: Rows | None = None,
        unit: bool = False,
        backend: str = "torch",
        device: torch.device | str | None = None,
        ids: Int64[np.ndarray, " n"] | None = None,
    ) -> None:
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise DataError(f"features must be an array [n, d], got shape {tuple(rows.shape)}")
        home = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        self.device = torch.device(device) if device is not None else home
        self.rows = _resident(rows, self.device)
        self.ids = ids
        self.n = len(rows) if ids is None else len(ids)
        self.dim = int(rows.shape[1])
        self.unit = unit
        self.backend = backend
        self.weights = None if weights is None else _weights(weights, len(rows)).to(self.device)

    def take(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Copies of some rows, float32 on our device."""
        places = ids.cpu().numpy()
        return self._read(places if self.ids is None else self.ids[places])

    def select(self, ids: Int64[np.ndarray, " m"]) -> ArrayPoints:
        """A view of some rows; ids of the view are positions in `ids`."""
        places = ids if self.ids is None else self.ids[ids]
        return self._view(unit=self.unit, backend=self.backend, ids=places)

    def configured(self, *, unit: bool, backend: str) -> ArrayPoints:
        """The same rows, read as unit rows or as they are, searched by `backend`."""
        return self._view(unit=unit, backend=backend, ids=self.ids)

    def _view(self, *, unit: bool, backend: str, ids: np.ndarray | None) -> ArrayPoints:
        rows, device, weights = self.rows, self.device, self.weights
        return ArrayPoints(
            rows, weights=weights, unit=unit, backend=backend, device=device, ids=ids
        )

    def tiles(self, size: int) -> Iterator[tuple[int, Float32[Tensor, "m d"]]]:
        """(first id, rows in float32 on our device), in order, `size` rows at a time."""
        for start in range(0, self.n, size):
            piece = slice(start, min(start + size, self.n))
            yield start, self._read(piece if self.ids is None else self.ids[piece])

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first rows that hold NaN or infinity."""
        bad: list[int] = []
        for start, rows in self.tiles(2048):
            if not torch.isfinite(rows.sum(dtype=torch.float64)):
                wrong = ~torch.isfinite(rows).all(1)
                bad += (start + wrong.nonzero().flatten()).tolist()
        if bad:
            names = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise NumericalError(
                f"{len(bad)} of {self.n} feature rows are not finite: row {names}. Leave them out "
                "(assignment -1) or look for overflow in the backbone."
            )

    def visit(self, centroids: Float32[Tensor, "k d"]) -> Pass:
        """Assign every point to its nearest centroid and sum up, in one pass over the rows."""
        k = len(centroids)
        labels = torch.empty(self.n, dtype=torch.int32, device=self.device)
        distances = torch.empty(self.n, device=self.device)
        sums = torch.zeros(k, self.dim, dtype=torch.float64, device=self.device)
        search = SEARCHES[self.backend](centroids, self.unit)
        first = first_of_equals(centroids)
        with full_precision():
            for start, rows in self.tiles(self._tile(k)):
                stop = start + len(rows)
                found = first[search(rows)]
                labels[start:stop] = found
                distances[start:stop] = (rows - centroids[found]).square_().sum(1)
                self._sum(sums, found, rows, start)
        return self._finish(labels, distances, sums)

    def total(self, labels: Int32[Tensor, " n"], k: int) -> Pass:
        """Sums of given labels (-1: left out), without distances; for a warm start."""
        sums = torch.zeros(k + 1, self.dim, dtype=torch.float64, device=self.device)
        labels = torch.where(labels < 0, k, labels)
        for start, rows in self.tiles(2048):
            self._sum(sums, labels[start : start + len(rows)].long(), rows, start)
        whole = self._finish(labels, torch.zeros(self.n, device=self.device), sums)
        return Pass(labels, whole.distances, sums[:k], whole.mass[:k], whole.counts[:k], 0.0)

    def farthest(self, found: Pass) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Each cluster's farthest member (lowest id of equals) and its distance; -1 if none."""
        labels, k = found.labels.long(), len(found.counts)
        most = torch.full((k,), -1.0, device=self.device)
        most.scatter_reduce_(0, labels, found.distances, "amax")
        winners = (found.distances == most[labels]).nonzero().flatten()
        ids = torch.full((k,), self.n, dtype=torch.int64, device=self.device)
        ids.scatter_reduce_(0, labels[winners], winners, "amin")
        return torch.where(ids == self.n, -1, ids), most

    def weigh(self, distances: Float32[Tensor, " n"]) -> float:
        """Weighted sum of distances in float64: the inertia."""
        wide = distances.double()
        if self.weights is not None:
            wide *= self._weights_of(0, self.n)
        return float(wide.sum())

    def _read(self, where: slice | np.ndarray) -> Float32[Tensor, "m d"]:
        if isinstance(self.rows, Tensor):
            place = where if isinstance(where, slice) else torch.from_numpy(where)
            rows = self.rows[place.to(self.rows.device) if isinstance(place, Tensor) else place]
        else:
            rows = torch.from_numpy(np.array(self.rows[where]))
        rows = rows.to(device=self.device, dtype=torch.float32)
        return unit_rows(rows) if self.unit else rows

    def _tile(self, k: int) -> int:
        """Rows of a tile. FAISS makes its own tiles inside, so it gets more."""
        if self.backend == "faiss":
            return 65_536
        size = TILE.get(self.device.type, TILE["cpu"]) // max(k, self.dim)
        return min(max(size, 256), 65_536)

    def _sum(self, sums: Tensor, labels: Tensor, rows: Tensor, start: int) -> None:
        """Add rows to their clusters in float64; fp16 rows add exactly, in any order."""
        wide = rows.double()
        if self.weights is not None:
            wide *= self._weights_of(start, len(rows))[:, None]
        sums.index_add_(0, labels, wide)

    def _weights_of(self, start: int, count: int) -> Float64[Tensor, " m"]:
        assert self.weights is not None
        if self.ids is None:
            return self.weights[start : start + count]
        return self.weights[torch.from_numpy(self.ids[start : start + count]).to(self.device)]

    def _finish(self, labels: Tensor, distances: Tensor, sums: Tensor) -> Pass:
        counts = torch.bincount(labels, minlength=len(sums))
        mass = counts.double()
        if self.weights is not None:
            mass = torch.bincount(labels, self._weights_of(0, self.n), minlength=len(sums))
        return Pass(labels, distances, sums, mass, counts, self.weigh(distances))


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to unit L2 norm; a zero row stays zero and is never NaN."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def as_tensor(values: Rows) -> Tensor:
    """A tensor of an array, copied: torch warns about sharing memory that is read-only."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _resident(rows: Rows, device: torch.device) -> Rows:
    """Rows that can be sliced cheaply: on the GPU if they fit there, else where they are."""
    if isinstance(rows, np.ndarray) and rows.flags.writeable:
        rows = torch.from_numpy(rows)  # shares memory; a memory map is still read page by page
    if isinstance(rows, Tensor) and device.type == "cuda" and not rows.is_cuda:
        free, _ = torch.cuda.mem_get_info(device)
        return rows.to(device) if rows.nbytes < 0.8 * free else rows
    return rows


def _weights(weights: Rows, n: int) -> Float64[Tensor, " n"]:
    tensor = as_tensor(weights).double()
    if tensor.shape != (n,):
        raise DataError(f"weights must have shape ({n},), got {tuple(tensor.shape)}")
    bad = (~(torch.isfinite(tensor) & (tensor >= 0))).nonzero().flatten()
    if len(bad):
        raise DataError(f"weight {int(bad[0])} is {float(tensor[bad[0]])}; weights must be >= 0")
    return tensor
