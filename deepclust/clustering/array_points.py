"""Points over an array: one class for memory, a memory map and a GPU, read tile by tile.

FAISS and torch differ in one function, the search for the nearest centroid (`search.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from torch import Tensor

from deepclust.clustering.exact_sums import BINS, ClusterSums, grid_of, into_bins, on_grid
from deepclust.clustering.nearest import squared_distances
from deepclust.clustering.points import (
    Pass,
    Rows,
    as_tensor,
    inertia_of,
    largest_of,
    not_finite,
    unit_rows,
)
from deepclust.clustering.precision import full_precision
from deepclust.clustering.search import SEARCHES
from deepclust.clustering.tiles import each_tile
from deepclust.errors import DataError, NumericalError

# numbers of a tile: what a core's cache holds, and on a GPU (not measured there) what keeps it busy
# between launches, half a GB of scores; 2**23 would be 104 rows for 80,000 centroids
TILE = {"cpu": 2**21, "cuda": 2**27}
MOST = 65_536  # rows of a tile


@dataclass(frozen=True)
class Grids:
    """Multiples on which sums are exact: of weighted rows, of weights, of weighted |x|^2."""

    rows: float
    weights: float
    power: float
    count: int


class ArrayPoints:
    """Points over an array: numpy, memory-mapped (read tile by tile) or torch, fp16 to fp64.

    `unit=True` scales every row to unit norm as it is read (spherical k-means). A pass uses
    `threads`, by default as many as torch has.
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
        threads: int | None = None,
    ) -> None:
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise DataError(f"features must be an array [n, d], got shape {tuple(rows.shape)}")
        home = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        self.device = torch.device(device) if device is not None else home
        self.rows = _resident(rows, self.device)
        self.ids = ids
        self.n = self.held = len(rows) if ids is None else len(ids)
        self.dim = int(rows.shape[1])
        self.unit = unit
        self.backend = backend
        self.threads = (threads or torch.get_num_threads()) if self.device.type == "cpu" else 1
        self.weights = None if weights is None else _weights(weights, len(rows)).to(self.device)
        self.grids: Grids | None = None  # see `exact.py`
        self.power: float | None = None  # sum of w |x|^2, from the first pass

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
        return ArrayPoints(
            self.rows, weights=self.weights, unit=unit, backend=backend, device=self.device,
            ids=ids, threads=self.threads,
        )  # fmt: skip

    def tile(self, start: int, size: int) -> Float32[Tensor, "m d"]:
        """At most `size` rows from `start` on, float32 on our device."""
        piece = slice(start, min(start + size, self.n))
        return self._read(piece if self.ids is None else self.ids[piece])

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first rows that hold NaN or infinity."""
        bad, largest = self.survey()
        if len(bad):
            raise NumericalError(not_finite(bad, len(bad), self.n))
        self.set_grids(largest, self.heaviest(), self.n)

    def survey(self) -> tuple[Int64[np.ndarray, " b"], float]:
        """Rows that are not finite, and the largest magnitude of a number in the others."""
        size, bad, largest = self._tile(1), [np.zeros(0, np.int64)], [0.0]

        def look(start: int) -> None:
            rows = self.tile(start, size)
            low, high = (float(value) for value in torch.aminmax(rows))
            if np.isfinite(high - low):
                largest.append(max(high, -low))
            else:
                wrong = ~torch.isfinite(rows).all(1)
                bad.append(start + wrong.nonzero().flatten().cpu().numpy())

        each_tile(look, self.n, size, self.threads)
        return np.sort(np.concatenate(bad)), max(largest)

    def heaviest(self) -> float:
        """The largest weight; 1 without weights."""
        weights = self._weights_of(0, self.n)
        if weights is None:
            return 1.0
        return float(weights.max()) if self.n else 0.0

    def set_grids(self, largest: float, heaviest: float, n: int) -> None:
        """Choose the grids for n rows of numbers up to `largest` and weights up to `heaviest`."""
        power = heaviest * self.dim * largest * largest
        self.grids = Grids(
            grid_of(largest * heaviest, n), grid_of(heaviest, n), grid_of(power, n), n
        )

    def visit(
        self, centroids: Float32[Tensor, "k d"], before: Pass | None = None, distances: bool = True
    ) -> Pass:
        """Assign every point to its nearest centroid and sum up, in one pass over the rows."""
        k = len(centroids)
        labels = torch.empty(self.n, dtype=torch.int32, device=self.device)
        reach = torch.empty(self.n if distances else 0, device=self.device)
        sums, powers = self._sums(k), []
        search = SEARCHES[self.backend](centroids, self.rows.dtype == torch.float16)
        size = self._tile(k)

        def assign(start: int) -> None:
            rows = self.tile(start, size)
            piece, weights = slice(start, start + len(rows)), self._weights_of(start, len(rows))
            found = search(rows)
            labels[piece] = found
            if distances:
                reach[piece] = squared_distances(rows, centroids, found)
            if self.power is None:
                powers.append(self._power(rows, weights))
            sums.add(found, rows, weights, None if before is None else before.labels[piece])

        with full_precision():
            each_tile(assign, self.n, size, self.threads)
        self.power = sum(powers) if self.power is None else self.power
        total = sums.bins if before is None else before.bins + sums.bins
        return self._finish(labels, reach, total, centroids)

    def total(self, labels: Int32[Tensor, " n"], k: int) -> Pass:
        """Sums of given labels (-1: left out), without distances; for a warm start."""
        sums = self._sums(k + 1)
        labels = torch.where(labels < 0, k, labels)
        size = self._tile(1)

        def sum_up(start: int) -> None:
            rows = self.tile(start, size)
            own = labels[start : start + len(rows)].long()
            sums.add(own, rows, self._weights_of(start, len(rows)))

        each_tile(sum_up, self.n, size, self.threads)
        counts, mass = self._sizes(labels, k + 1)
        none = torch.zeros(0, device=self.device)
        return Pass(labels, none, sums.bins[:, :k], mass[:, :k], counts[:k], 0.0)

    def farthest(self, found: Pass) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Each cluster's farthest member (lowest id of equals) and its distance; -1 if none."""
        labels, k = found.labels.long(), len(found.counts)
        most = torch.full((k,), -1.0, device=self.device)
        most.scatter_reduce_(0, labels, found.distances, "amax")
        winners = (found.distances == most[labels]).nonzero().flatten()
        ids = torch.full((k,), self.n, dtype=torch.int64, device=self.device)
        ids.scatter_reduce_(0, labels[winners], winners, "amin")
        return torch.where(ids == self.n, -1, ids), most

    def recount(self, found: Pass, labels: Tensor, distances: Tensor) -> Pass:
        """The pass with other labels and distances: counts and inertia anew, sums left as is."""
        counts = torch.bincount(labels, minlength=len(found.counts))
        inertia = self.weigh(distances, self.heaviest() * largest_of(distances), self.n)
        return Pass(labels, distances, found.bins, found.weights, counts, inertia)

    def holds(self, ids: Int64[Tensor, " m"]) -> tuple[Bool[Tensor, " m"], Int64[Tensor, " h"]]:
        """All of them, at themselves."""
        return torch.ones_like(ids, dtype=torch.bool), ids

    def at(self, values: Int32[Tensor, " n"], ids: Int64[Tensor, " m"]) -> Int32[Tensor, " m"]:
        """The values of these ids."""
        return values[ids]

    def count(self, rows: Bool[Tensor, " n"]) -> int:
        """How many rows are marked."""
        return int(rows.sum())

    def lowest(self, keys: Float32[Tensor, " n"], m: int) -> tuple[Tensor, Tensor]:
        """Ids and keys of the m rows of lowest finite key, ascending, the lower id first."""
        able = torch.isfinite(keys).nonzero().flatten()
        ids = able[torch.argsort(keys[able], stable=True)[:m]]
        return ids, keys[ids]

    def weigh(self, distances: Float32[Tensor, " n"], bound: float, n: int) -> float:
        """Weighted sum of distances in float64, exact after rounding for n up to `bound`."""
        if not np.isfinite(bound):
            return float("nan")
        wide = distances.double()
        weights = self._weights_of(0, self.n)
        if weights is not None:
            wide *= weights
        return float(on_grid(wide, grid_of(bound, n)).sum())

    def _read(self, where: slice | np.ndarray) -> Float32[Tensor, "m d"]:
        if isinstance(self.rows, Tensor):
            place = where if isinstance(where, slice) else torch.from_numpy(where)
            rows = self.rows[place.to(self.rows.device) if isinstance(place, Tensor) else place]
        else:
            rows = as_tensor(self.rows[where])
        rows = rows.to(device=self.device, dtype=torch.float32)
        return unit_rows(rows) if self.unit else rows

    def _tile(self, k: int) -> int:
        """Rows of a tile for k scores each: few enough for the cache, and for threads to share."""
        size = TILE.get(self.device.type, TILE["cpu"]) // max(k, self.dim)
        share = -(-self.n // (4 * self.threads))
        return min(max(min(size, share), 64), MOST)

    def _grids(self) -> Grids:
        if self.grids is None:
            self.check_finite()
        assert self.grids is not None
        return self.grids

    def _power(self, rows: Tensor, weights: Tensor | None) -> float:
        """The sum of w |x|^2 over the rows of a tile, on its grid."""
        powers = rows.double().square_().sum(1)
        return float(
            on_grid(powers if weights is None else powers * weights, self._grids().power).sum()
        )

    def _sums(self, k: int) -> ClusterSums:
        zeros = torch.zeros(BINS, k, self.dim, dtype=torch.float64, device=self.device)
        return ClusterSums(zeros, self._grids().rows, self._grids().count)

    def _weights_of(self, start: int, count: int) -> Float64[Tensor, " m"] | None:
        if self.weights is None:
            return None
        if self.ids is None:
            return self.weights[start : start + count]
        return self.weights[torch.from_numpy(self.ids[start : start + count]).to(self.device)]

    def _sizes(self, labels: Tensor, k: int) -> tuple[Int64[Tensor, " k"], Float64[Tensor, "b k"]]:
        """Rows and weight of each cluster."""
        counts = torch.bincount(labels, minlength=k)
        weights = self._weights_of(0, self.n)
        if weights is None:
            return counts, counts.double()[None]
        parts = into_bins(weights, self._grids().weights, self._grids().count)
        return counts, torch.stack([torch.bincount(labels, part, minlength=k) for part in parts])

    def _finish(self, labels: Tensor, distances: Tensor, sums: Tensor, centroids: Tensor) -> Pass:
        counts, mass = self._sizes(labels, sums.shape[1])
        found = Pass(labels, distances, sums, mass, counts, 0.0)
        if len(distances):
            bound = self.heaviest() * largest_of(distances)
            return replace(found, inertia=self.weigh(distances, bound, self.n))
        assert self.power is not None
        return replace(found, inertia=inertia_of(self.power, found, centroids))


def _resident(rows: Rows, device: torch.device) -> Rows:
    """Rows that can be sliced cheaply: on the GPU if they fit there, else where they are."""
    if device.type == "cuda" and not (isinstance(rows, Tensor) and rows.is_cuda):
        free, _ = torch.cuda.mem_get_info(device)
        return _copied(rows, device) if rows.nbytes < 0.8 * free else rows
    if isinstance(rows, np.ndarray) and rows.flags.writeable and rows.flags.c_contiguous:
        return torch.from_numpy(rows) if rows.dtype.isnative else rows  # shares memory
    return rows.detach() if isinstance(rows, Tensor) else rows


def _copied(rows: Rows, device: torch.device) -> Tensor:
    """A copy on the device, made piece by piece, since a memory map may not fit into memory."""
    copy = torch.empty(rows.shape, dtype=as_tensor(rows[:0]).dtype, device=device)
    for start in range(0, len(rows), MOST):
        copy[start : start + MOST] = as_tensor(rows[start : start + MOST])
    return copy


def _weights(weights: Rows, n: int) -> Float64[Tensor, " n"]:
    tensor = as_tensor(weights).double()
    if tensor.shape != (n,):
        raise DataError(f"weights must have shape ({n},), got {tuple(tensor.shape)}")
    bad = (~(torch.isfinite(tensor) & (tensor >= 0))).nonzero().flatten()
    if len(bad):
        raise DataError(f"weight {int(bad[0])} is {float(tensor[bad[0]])}; weights must be >= 0")
    return tensor
