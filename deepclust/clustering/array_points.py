"""Points over an array: one class for memory, a memory map and a GPU, read tile by tile.

FAISS and torch differ in one function, the search for the nearest centroid (`search.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from torch import Tensor

from deepclust.clustering.arguments import as_array
from deepclust.clustering.bounds import Moves
from deepclust.clustering.exact_sums import (
    PARTIALS,
    ClusterSums,
    grid_of,
    into_partials,
    on_grid,
    sums_by_id,
)
from deepclust.clustering.frame import Frame
from deepclust.clustering.fused import FusedNearest, Late
from deepclust.clustering.kept_rows import KeptRows, may_keep
from deepclust.clustering.nearest import CACHED, Nearest, squared_distances
from deepclust.clustering.points import (
    Assignment,
    Rows,
    as_tensor,
    cost_of,
    largest_of,
    not_finite,
    unit_rows,
)
from deepclust.clustering.precision import full_precision, one_blas_thread
from deepclust.clustering.residence import (
    MEMORY,
    copied,
    is_on,
    resident,
    type_of,
)
from deepclust.clustering.search import SEARCHES, Search
from deepclust.clustering.tile_sizes import compiled_tile_rows, tile_rows
from deepclust.clustering.tiles import Tile, do_nothing, each_tile
from deepclust.clustering.tiles_ahead import TilesAhead
from deepclust.copies import sent
from deepclust.errors import DataError, NumericalError

GATHERED = 4096  # rows of a memory map that are read between two signs of life


@dataclass(frozen=True)
class Grids:
    """Multiples on which sums are exact: of weighted rows, of weights, of weighted |x|^2."""

    rows: float
    weights: float
    sum_sq: float
    count: int


class ArrayPoints:
    """Points over an array: numpy, memory-mapped (read tile by tile) or torch, fp16 to fp64.

    `spherical=True` scales every row to unit norm as it is read. A pass uses `threads` threads, by
    default those that torch uses. `alive` is called after every tile: a pass can take minutes.

    Raises `DataError` for an array that is not [n, d], or for a weight that is not allowed.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        weights: Rows | None = None,
        spherical: bool = False,
        backend: str = "torch",
        device: torch.device | str | None = None,
        threads: int | None = None,
        alive: Callable[[], None] = do_nothing,
    ) -> None:
        rows = as_array(rows, "features")
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise DataError(f"features must be an array [n, d], got shape {tuple(rows.shape)}")
        home = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        self.device = torch.device(device) if device is not None else home
        self.rows = resident(rows, self.device, alive)
        self.ids: Int64[np.ndarray, " n"] | None = None  # of a view: its rows
        self.n = self.n_local = len(rows)
        self.dim = int(rows.shape[1])
        self.spherical = spherical
        self.backend = backend
        self.threads = (threads or torch.get_num_threads()) if self.device.type == "cpu" else 1
        self.weights = None if weights is None else _weights(weights, len(rows)).to(self.device)
        self.alive = alive
        self.frame: Frame | None = None
        self.grids: Grids | None = None  # see `exact_sums.py`
        self.sum_sq: Float64[Tensor, ""] | None = None  # sum of w |x|^2, from the first pass
        self.kept: KeptRows | None = None  # packed rows, from the first pass

    def gather(self, ids: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Return copies of some rows, float32 on the points' device."""
        places = ids.cpu().numpy()
        places = places if self.ids is None else self.ids[places]
        if isinstance(self.rows, Tensor) or len(places) <= GATHERED:
            return self._read(places)
        pieces = []  # of a memory map: each row may be a read from disk
        for start in range(0, len(places), GATHERED):
            pieces.append(self._read(places[start : start + GATHERED]))
            self.alive()
        return torch.cat(pieces)

    def move_in(self) -> ArrayPoints:
        """Copy the rows to the device's own memory if they fit there now, and return the points.

        Every pass reads them. An array that did not fit may have a view that does.
        """
        free = MEMORY.get(self.device.type)
        if free is None or is_on(self.rows, self.device):
            return self
        ids = np.arange(self.n) if self.ids is None else self.ids
        if self.n * self.rows[:1].nbytes >= free(self.device):
            return self
        weights = self._weights_of(0, self.n)
        self.rows = copied(self.rows, self.device, self.alive, ids)
        self.weights, self.ids = weights, None
        return self

    def note(self) -> str | None:
        """Return what a user should know of rows that are not in the device's own memory."""
        free = MEMORY.get(self.device.type)
        if free is None or is_on(self.rows, self.device) or not self.n:
            return None
        need = self.n * self.rows[:1].nbytes
        return (
            f"{self.n:,} rows of {need / 1e9:.1f} GB do not fit into the free "
            f"{free(self.device) / 1e9:.1f} GB of {self.device}, so they are read from disk or "
            "from the host's memory in every pass. Cluster by more ranks (cluster.where=ranks), "
            "set cluster.dim lower, or cluster on a GPU without a rank"
        )

    def select(self, ids: Int64[np.ndarray, " m"]) -> ArrayPoints:
        """Return a view of some rows.

        Ids of the view are positions in `ids`.
        """
        view = self._copy()
        view.ids = ids if self.ids is None else self.ids[ids]
        view.__dict__.pop("_ids_there", None)
        view.n = view.n_local = len(ids)
        return view

    def framed(self, frame: Frame | None) -> ArrayPoints:
        """Return the same rows in the coordinates of a frame."""
        view = self._copy()
        view.frame = frame
        return view

    def configure(self, *, spherical: bool, backend: str) -> ArrayPoints:
        """Return the same rows, read as unit rows or as they are, searched by `backend`."""
        view = self._copy()
        view.spherical, view.backend = spherical, backend
        return view

    def _copy(self) -> ArrayPoints:
        """Return the same rows without what is known of their values."""
        view = copy.copy(self)
        view.grids, view.sum_sq, view.kept = None, None, None
        return view

    def read_tile(self, start: int, size: int) -> Float32[Tensor, "m d"]:
        """Return at most `size` rows from `start` on, float32 on the points' device."""
        return self._at(slice(start, min(start + size, self.n)))

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first rows that hold NaN or infinity."""
        bad, largest = self.scan_values()
        if len(bad):
            raise NumericalError(not_finite(bad, len(bad), self.n))
        self.set_grids(largest, self.max_weight(), self.n)

    def scan_values(self) -> tuple[Int64[np.ndarray, " b"], float]:
        """Return the ids of rows that are not finite, and the largest magnitude in the others."""
        size, ranges = self._tile(1), {}

        def scan(start: int) -> None:
            ranges[start] = torch.stack(torch.aminmax(self.read_tile(start, size)))

        each_tile(scan, self.n, size, self.threads, self.alive)
        if not ranges:
            return np.zeros(0, np.int64), 0.0
        starts = np.sort(list(ranges))
        ends = torch.stack([ranges[start] for start in starts.tolist()]).cpu().double().numpy()
        low, high = ends.T
        finite = np.isfinite(ends).all(1)
        wrong = [self._not_finite(start, size) for start in starts[~finite].tolist()]
        largest = np.maximum(high, -low)[finite]
        return np.concatenate([np.zeros(0, np.int64), *wrong]), float(largest.max(initial=0.0))

    def _not_finite(self, start: int, size: int) -> Int64[np.ndarray, " b"]:
        finite = torch.isfinite(self.read_tile(start, size)).all(1)
        return start + np.flatnonzero(~finite.cpu().numpy())

    def list_weights(self) -> Float64[np.ndarray, " n"] | None:
        """Return the weights of all rows, or None without weights."""
        weights = self._weights_of(0, self.n)
        return None if weights is None else weights.cpu().numpy()

    def weighs(self) -> Bool[Tensor, " n"] | None:
        """Return which rows weigh more than nothing, or None where all of them do."""
        weights = self._weights_of(0, self.n)
        return None if weights is None or bool((weights > 0).all()) else weights > 0

    def count_members(self, cluster_ids: Int32[Tensor, " n"], k: int) -> Int64[Tensor, " k"]:
        """Return the number of rows of each cluster that weigh more than nothing."""
        weighs = self.weighs()
        return sums_by_id(cluster_ids if weighs is None else cluster_ids[weighs], k)

    def max_weight(self) -> float:
        """Return the largest weight, or 1 without weights."""
        weights = self._weights_of(0, self.n)
        if weights is None:
            return 1.0
        return float(weights.max()) if self.n else 0.0

    def set_grids(self, largest: float, max_weight: float, n: int) -> None:
        """Choose the grids for n rows of numbers up to `largest` and weights up to `max_weight`."""
        sum_sq = max_weight * self.dim * largest * largest
        self.grids = Grids(
            grid_of(largest * max_weight, n), grid_of(max_weight, n), grid_of(sum_sq, n), n
        )

    def assign_to(
        self,
        centroids: Float32[Tensor, "k d"],
        before: Assignment | None = None,
        distances: bool = True,
    ) -> Assignment:
        """Assign every point to its nearest centroid and sum up, in one pass over the rows."""
        k = len(centroids)
        cluster_ids = torch.empty(self.n, dtype=torch.int32, device=self.device)
        reach = torch.empty(self.n if distances else 0, device=self.device)
        sums, squares = self._sums(k), []
        search = self._search(centroids, before)
        late = Late(search, self.n) if isinstance(search, FusedNearest) else None
        if isinstance(search, Moves):
            size = compiled_tile_rows(self.n, self.dim, k, self.threads)
        else:
            size = self._tile(k if late is None else 1)  # a fused search has no scores to hold

        def assign(start: int) -> None:
            piece = slice(start, min(start + size, self.n))
            tile, weights = Tile(piece, self._at), self._weights_of(start, piece.stop - start)
            if late is not None:
                nearest = late.guess(start, tile.rows)
            elif isinstance(search, Moves | Nearest) and self.kept is not None:
                nearest = self.kept.nearest(search, tile)
            else:
                nearest = cast(Search, search)(tile.rows)
            cluster_ids[piece] = nearest
            if distances:
                reach[piece] = squared_distances(tile.rows, centroids, nearest)
            if self.sum_sq is None:
                squares.append(self._sum_sq(tile.rows, weights))
            if before is None:
                sums.add(nearest, tile.rows, weights)
            else:
                sums.move(before.cluster_ids[piece], nearest, tile, weights)

        with full_precision(), one_blas_thread() if isinstance(search, Moves) else nullcontext():
            each_tile(assign, self.n, size, self.threads, self.alive)
        if isinstance(search, Moves):
            search.bounds.hold(centroids, cluster_ids)
        if late is not None:
            self._settle(late, centroids, cluster_ids, reach, sums)
        if self.sum_sq is None:  # on their grid, so exact in any order
            none = torch.zeros((), dtype=torch.float64, device=self.device)
            self.sum_sq = torch.stack(squares).sum() if squares else none
        total = sums.partials if before is None else before.partials + sums.partials
        return self._finish(cluster_ids, reach, total, centroids)

    def _search(
        self, centroids: Float32[Tensor, "k d"], before: Assignment | None
    ) -> Search | Moves:
        """Return this pass's search; one that packs the rows finds them packed the next time."""
        if self.kept is None:
            search = SEARCHES[self.backend](centroids, type_of(self.rows) == torch.float16)
            if not isinstance(search, Nearest):
                return search
            in_memory = self.n * self.rows[:1].nbytes if isinstance(self.rows, Tensor) else 0
            if not may_keep(self.n, search.row_bytes, in_memory):
                return search
            self.kept = KeptRows.empty(self.n, search)
        return self.kept.search(centroids, None if before is None else before.cluster_ids)

    def _settle(
        self,
        late: Late,
        centroids: Float32[Tensor, "k d"],
        cluster_ids: Int32[Tensor, " n"],
        reach: Float32[Tensor, " n"],
        sums: ClusterSums,
    ) -> None:
        """Let the CPU decide the rows that a pass left open, and mend ids, distances and sums."""
        places, rows, before, after = late.settle(cluster_ids, self._gather_here, self._is_here)
        if not len(places):
            return
        cluster_ids[places] = after.int()
        if len(reach):
            reach[places] = squared_distances(rows, centroids, after)
        # sums are exact, so taking a row off again leaves what would be there without it
        whole = self._weights_of(0, self.n)
        weights = torch.ones_like(places).double() if whole is None else whole[places]
        sums.add(before, rows, -weights)
        sums.add(after, rows, weights)

    @property
    def _is_here(self) -> bool:
        """Whether the rows lie on the device, so that no look at them waits for it."""
        return is_on(self.rows, self.device)

    def _gather_here(self, places: Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Return some rows of these points: without a wait where they lie on the device."""
        if not self._is_here:
            return self.gather(places)
        assert isinstance(self.rows, Tensor)
        own = places if self.ids is None else self._ids_there[places]
        return self._as_read(self.rows[own])

    def sum_clusters(self, cluster_ids: Int32[Tensor, " n"], k: int) -> Assignment:
        """Sum up the rows of given clusters (-1: left out), without distances."""
        sums = self._sums(k + 1)
        cluster_ids = torch.where(cluster_ids < 0, k, cluster_ids)
        size = self._tile(1)

        def sum_up(start: int) -> None:
            rows = self.read_tile(start, size)
            own = cluster_ids[start : start + len(rows)].long()
            sums.add(own, rows, self._weights_of(start, len(rows)))

        each_tile(sum_up, self.n, size, self.threads, self.alive)
        counts, mass = self._sizes(cluster_ids, k + 1)
        none = torch.zeros(0, device=self.device)
        cost = torch.zeros((), dtype=torch.float64, device=self.device)  # that of no distances
        return Assignment(cluster_ids, none, sums.partials[:, :k], mass[:, :k], counts[:k], cost)

    def find_farthest(
        self, assignment: Assignment
    ) -> tuple[Int64[Tensor, " k"], Float32[Tensor, " k"]]:
        """Return each cluster's farthest member (ties: lowest id) and its distance; -1: none.

        Rows of weight 0 are no members.
        """
        cluster_ids, k = assignment.cluster_ids.long(), len(assignment.counts)
        most = torch.full((k,), -1.0, device=self.device)
        weighs = self.weighs()
        reach = assignment.distances
        reach = reach if weighs is None else torch.where(weighs, reach, -1.0)
        most.scatter_reduce_(0, cluster_ids, reach, "amax")
        winners = ((reach == most[cluster_ids]) & (reach >= 0)).nonzero().flatten()
        ids = torch.full((k,), self.n, dtype=torch.int64, device=self.device)
        ids.scatter_reduce_(0, cluster_ids[winners], winners, "amin")
        return torch.where(ids == self.n, -1, ids), most

    def recount(self, assignment: Assignment, cluster_ids: Tensor, distances: Tensor) -> Assignment:
        """Return the assignment with other clusters and distances.

        Its sums stay as they were.
        """
        counts = self.count_members(cluster_ids, len(assignment.counts))
        cost = self.weighted_sum(distances, self.max_weight() * largest_of(distances), self.n)
        return Assignment(
            cluster_ids, distances, assignment.partials, assignment.partial_mass, counts, cost
        )

    def locate(self, ids: Int64[Tensor, " m"]) -> tuple[Bool[Tensor, " m"], Int64[Tensor, " h"]]:
        """Return that all ids are here, each at its own row."""
        return torch.ones_like(ids, dtype=torch.bool), ids

    def gather_values(
        self, values: Int32[Tensor, " n"], ids: Int64[Tensor, " m"]
    ) -> Int32[Tensor, " m"]:
        """Return the values of these ids."""
        return values[ids]

    def count(self, rows: Bool[Tensor, " n"]) -> Int64[Tensor, ""]:
        """Return how many rows are marked."""
        return rows.sum()

    def find_lowest(self, keys: Float32[Tensor, " n"], m: int) -> tuple[Tensor, Tensor]:
        """Return ids and keys of the m rows of lowest finite key, ascending, ties by id."""
        able = torch.isfinite(keys).nonzero().flatten()
        ids = able[torch.argsort(keys[able], stable=True)[:m]]
        return ids, keys[ids]

    def weighted_sum(
        self, distances: Float32[Tensor, " n"], bound: float, n: int
    ) -> Float64[Tensor, ""]:
        """Return the weighted sum of distances in float64, exact for n numbers up to `bound`."""
        if not np.isfinite(bound):
            return torch.full((), torch.nan, dtype=torch.float64, device=self.device)
        wide = distances.double()
        weights = self._weights_of(0, self.n)
        if weights is not None:
            wide *= weights
        return on_grid(wide, grid_of(bound, n)).sum()

    def _at(self, where: slice | Int64[Tensor, " m"]) -> Float32[Tensor, "m d"]:
        """Return the rows at a range of these points, or at some of their places."""
        rows = self.rows
        if isinstance(rows, Tensor) and rows.is_cuda and isinstance(where, slice):
            # the ids of a view are there too, or each tile would wait for a copy of them
            own = where if self.ids is None else self._ids_there[where]
            return self._as_read(rows[own])
        place = where if isinstance(where, slice) else where.cpu().numpy()
        there = place if self.ids is None else self.ids[place]
        if isinstance(where, slice) and self.device.type == "cuda":
            return self._as_read(self._sent(there))
        return self._read(there)

    def _sent(self, where: slice | np.ndarray) -> Tensor:
        """Return a tile of rows that are not on the GPU, copied beside the tile before."""
        self._tiles_ahead.make_room()
        return self._tiles_ahead.send(self.rows[where])

    def _read(self, where: slice | np.ndarray) -> Float32[Tensor, "m d"]:
        if isinstance(self.rows, Tensor) and isinstance(where, slice):
            rows = self.rows[where]
        elif isinstance(self.rows, Tensor):  # 4 times as fast as rows[places] on a CPU
            rows = self.rows.index_select(0, sent(torch.from_numpy(where), self.rows.device))
        else:
            rows = as_tensor(self.rows[where])
        return self._as_read(rows)

    def _as_read(self, rows: Tensor) -> Float32[Tensor, "m d"]:
        if self.frame is not None:
            rows = self.frame.narrow(rows.to(self.device))
        rows = rows.to(self.device).float()  # half as many bytes travel as the other way round
        return unit_rows(rows) if self.spherical else rows

    def _tile(self, k: int) -> int:
        """Return the rows of a tile of k scores each."""
        return tile_rows(self.n, self.dim, k, self.threads, self.device.type)

    @functools.cached_property
    def _tiles_ahead(self) -> TilesAhead:
        return TilesAhead(self.device)

    @functools.cached_property
    def _ids_there(self) -> Int64[Tensor, " n"]:
        """The rows of a view, on the device."""
        return sent(torch.from_numpy(np.asarray(self.ids, np.int64)), self.device)

    def _grids(self) -> Grids:
        if self.grids is None:
            self.check_finite()
        assert self.grids is not None
        return self.grids

    def _sum_sq(self, rows: Tensor, weights: Tensor | None) -> Float64[Tensor, ""]:
        """Return the sum of w |x|^2 over the rows of a tile, on its grid."""
        size = len(rows) if rows.is_cuda else max(1, CACHED // self.dim)
        squares = torch.cat([part.double().square_().sum(1) for part in torch.split(rows, size)])
        squares = squares if weights is None else squares * weights
        return on_grid(squares, self._grids().sum_sq).sum()

    def _sums(self, k: int) -> ClusterSums:
        zeros = torch.zeros(PARTIALS, k, self.dim, dtype=torch.float64, device=self.device)
        return ClusterSums(zeros, self._grids().rows, self._grids().count)

    def _weights_of(self, start: int, count: int) -> Float64[Tensor, " m"] | None:
        if self.weights is None:
            return None
        if self.ids is None:
            return self.weights[start : start + count]
        return self.weights[self._ids_there[start : start + count]]

    def _sizes(
        self, cluster_ids: Tensor, k: int
    ) -> tuple[Int64[Tensor, " k"], Float64[Tensor, "b k"]]:
        """Return the members and the weight of each cluster."""
        counts = self.count_members(cluster_ids, k)
        weights = self._weights_of(0, self.n)
        if weights is None:
            return counts, counts.double()[None]
        parts = into_partials(weights, self._grids().weights, self._grids().count)
        return counts, torch.stack([sums_by_id(cluster_ids, k, part) for part in parts])

    def _finish(
        self, cluster_ids: Tensor, distances: Tensor, sums: Tensor, centroids: Tensor
    ) -> Assignment:
        counts, mass = self._sizes(cluster_ids, sums.shape[1])
        assert self.sum_sq is not None
        assignment = Assignment(cluster_ids, distances, sums, mass, counts, self.sum_sq)
        if len(distances):
            bound = self.max_weight() * largest_of(distances)
            return replace(assignment, cost=self.weighted_sum(distances, bound, self.n))
        return replace(assignment, cost=cost_of(self.sum_sq, assignment, centroids))


def _weights(weights: Rows, n: int) -> Float64[Tensor, " n"]:
    tensor = as_tensor(as_array(weights, "weights")).double()
    if tensor.shape != (n,):
        raise DataError(f"weights must have shape ({n},), got {tuple(tensor.shape)}")
    bad = (~(torch.isfinite(tensor) & (tensor >= 0))).nonzero().flatten()
    if len(bad):
        raise DataError(f"weight {int(bad[0])} is {float(tensor[bad[0]])}; weights must be >= 0")
    return tensor
