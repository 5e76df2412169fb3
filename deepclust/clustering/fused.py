"""The nearest centroid on a GPU: the labels of the CPU's exact search, without n x k scores.

As on the CPU (`nearest.py`) a product in low precision guesses, an error bound says which rows it
leaves open, and float32 differences decide. The steps:

1. Rows and centroids are centred, scaled by powers of two and rounded to float16. What rounding did
   is measured. A kernel returns best score, second-best score and centroid of every row.
2. Rows whose second-best score is within twice the bound are gone over by a second kernel. It
   compares float32 differences of all candidates.
3. Where two distances differ by less than what float32 sums round, the order of a sum would decide.
   Such rivals are kept, and the CPU compares them once, at the end of a pass, as it always does.

So the labels are the CPU's, ties to the lowest id. Steps 1 and 2 never wait for the GPU, and step 3
waits once a pass. It sees at most one whitened row in fifty (`tests/clustering/test_fused.py`), so
room for a 32nd of them is copied without a look at their number. Where more are open it waits once
more.

The bound is the one of `nearest.py`, with 4 d u' for the float32 sums. Tensor cores may cut digits
off where others round (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering.nearest import FAINT, U32, Nearest, first_of_equals, squared_distances
from deepclust.copies import copied_to_host, sent

WIDTH = 16  # columns of a packed row come in multiples of this: aligned loads, whole products
SCALED = 7  # the largest number of a packed row, and the longest centroid, are near 2^7
TENSOR_CORES = (8, 0)  # the kernels spill registers on older ones (compiled for 7.5, 8.0 and 9.0)
NONE, SEVERAL = -1, -2  # rivals that are no centroid
SHARE, LEAST = 32, 256  # of the rows a 32nd, and so many, are copied before they are counted


class FusedNearest:
    """Search among centroids on their GPU.

    `guess` returns ids and rivals of a tile without a wait. `settle` decides between rivals, on the
    CPU. A call does both, for those who need no speed.
    """

    def __init__(self, centroids: Float32[Tensor, "k d"]) -> None:
        from deepclust.clustering import fused_kernel  # Triton may be missing where nothing calls

        self._kernel = fused_kernel
        self.centroids = centroids.contiguous()
        self.host = copied_to_host(self.centroids)
        wide = centroids.double()
        self.origin = wide.mean(0).float()
        offsets = wide - self.origin
        squares = offsets.square().sum(1)
        self.reach = squares.max().sqrt()
        self.scale = power_of_two(self.reach)
        self.columns = _padded(offsets * self.scale)
        kept = self.columns[:, : offsets.shape[1]].double() / self.scale
        self.lost = (offsets - kept).square().sum(1).max().sqrt()
        self.bias = torch.where(_repeats(centroids), torch.inf, squares / 2).float()

    def __call__(self, rows: Float32[Tensor, "m d"]) -> Int64[Tensor, " m"]:
        """Return the nearest centroid of every row."""
        ids, rivals = self.guess(rows)
        open_rows = (rivals != NONE).nonzero().flatten()
        settled = self.settle(rows[open_rows].cpu(), ids[open_rows].cpu(), rivals[open_rows].cpu())
        ids[open_rows] = settled.to(ids)
        return ids.long()

    def guess(
        self, rows: Float32[Tensor, "m d"]
    ) -> tuple[Int32[Tensor, " m"], Int32[Tensor, " m"]]:
        """Return ids, and rivals (NONE, SEVERAL or a centroid) where the CPU has the last word."""
        if not len(rows):
            return (none := torch.zeros(0, dtype=torch.int32, device=rows.device)), none
        rows = rows.contiguous()
        packed, facts = self._pack(rows)
        best, second, bits = self._kernel.guess_nearest(packed, facts, self.columns, self.bias)
        floor = best - facts[1]
        is_open = ~(second < floor)  # also where one is NaN
        out = torch.stack([bits.view(torch.int32), torch.full_like(bits, NONE, dtype=torch.int32)])
        listed, count = _list_of(is_open)
        facts = torch.stack([facts[0], floor])
        self._kernel.decide_candidates(
            (packed, facts, self.columns, self.bias), (rows, self.centroids), (listed, count), out
        )
        return out[0], out[1]

    def settle(
        self,
        rows: Float32[Tensor, "h d"],
        ids: Int32[Tensor, " h"],
        rivals: Int32[Tensor, " h"],
    ) -> Int64[Tensor, " h"]:
        """Return the ids of rows with rivals, all on the CPU, as the CPU's search does."""
        settled = ids.long()
        pair = (rivals >= 0).nonzero().flatten()
        first, second = settled[pair], rivals[pair].long()
        ours, theirs = (squared_distances(rows[pair], self.host, own) for own in (first, second))
        lower = (theirs < ours) | ((theirs == ours) & (second < first))
        settled[pair] = torch.where(lower, second, first)
        crowd = (rivals == SEVERAL).nonzero().flatten()
        if len(crowd):
            settled[crowd] = Nearest(self.host)(rows[crowd])
        return settled

    def _pack(self, rows: Float32[Tensor, "m d"]) -> tuple[Tensor, Float32[Tensor, "2 m"]]:
        """Return centred rows in float16, the factors of their products, and their margins."""
        dim = rows.shape[1]
        centred = rows - self.origin
        scales = power_of_two(centred.abs().amax(1, keepdim=True))
        scaled = centred * scales
        packed = _padded(scaled)
        kept = packed[:, :dim].float()
        lost = torch.linalg.vector_norm(scaled - kept, dim=1, dtype=torch.float64)
        lengths = torch.linalg.vector_norm(kept, dim=1, dtype=torch.float64)
        scales = scales[:, 0].double()
        lost, lengths = lost / scales, 1.01 * lengths / scales
        sums = (4 * packed.shape[1] + 16) * U32 * lengths * self.reach
        product = 1.01 * (lost * self.reach + lengths * self.lost) + sums + 8 * U32 * self.reach**2
        differences = (dim + 4) * U32 * (self.reach + lengths + lost) ** 2  # what decides rounds
        margins = 2.02 * (product + differences + FAINT)
        return packed, torch.stack([1 / (scales * self.scale), margins]).float()


class Late:
    """The rows of a pass that wait for the CPU: kept by their places, decided once at its end."""

    def __init__(self, search: FusedNearest, n: int) -> None:
        self.search = search
        self.rivals = torch.full((n,), NONE, dtype=torch.int32, device=search.centroids.device)

    def guess(self, start: int, rows: Float32[Tensor, "m d"]) -> Int64[Tensor, " m"]:
        """Return the ids of a tile, right but for the rows with rivals, which are kept."""
        ids, rivals = self.search.guess(rows)
        self.rivals[start : start + len(rows)] = rivals
        return ids.long()

    def settle(
        self,
        cluster_ids: Int32[Tensor, " n"],
        gather: Callable[[Tensor], Tensor],
        here: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return places, rows, old and new ids of the rows that change, on the device.

        It waits for the device once, for room's worth of rows and their number; and once more where
        there are more of them. Rows that are not `here`, on the device, are counted first.
        """
        if not len(self.rivals):
            return (
                (none := torch.zeros_like(cluster_ids, dtype=torch.int64)),
                gather(none),
                none,
                none,
            )
        listed, count = _list_of(self.rivals != NONE)
        room = len(listed) // SHARE + LEAST if here else int(count)
        places, rows, host = self._copied(cluster_ids, gather, listed[:room], count)
        number = int(host[-1, :1].view(torch.int32))
        if number > room:
            places, rows, host = self._copied(cluster_ids, gather, listed[:number], count)
        host = host[:number]
        before, rivals = host[:, -2:].contiguous().view(torch.int32).unbind(1)
        after = self.search.settle(host[:, :-2].contiguous(), before, rivals)
        changed = (after != before).nonzero().flatten()
        index, old, new = (
            sent(part, places.device) for part in (changed, before[changed].long(), after[changed])
        )
        return places[index], rows[index], old, new

    def _copied(
        self,
        cluster_ids: Int32[Tensor, " n"],
        gather: Callable[[Tensor], Tensor],
        listed: Int32[Tensor, " m"],
        count: Int32[Tensor, " 1"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return places, rows, and on the host the rows with ids and rivals, then the count."""
        places = listed.long()
        rows = gather(places)
        facts = torch.stack([cluster_ids[places], self.rivals[places]], 1)
        block = torch.cat([rows, facts.view(torch.float32)], 1)
        last = block.new_zeros(1, block.shape[1])
        last[0, :1] = count.view(torch.float32)
        return places, rows, torch.cat([block, last]).cpu()  # one copy: bits as they are


def power_of_two(largest: Tensor) -> Tensor:
    """Return a power of two that brings numbers up to `largest` near 2^SCALED; 1 for zeros."""
    _, exponents = torch.frexp(largest)
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.ldexp(torch.ones_like(largest), torch.where(usable, SCALED - exponents, 0))


def _padded(rows: Tensor) -> Tensor:
    """Return rows in float16, with zeros up to a multiple of WIDTH numbers."""
    width = -(-rows.shape[1] // WIDTH) * WIDTH
    packed = torch.zeros(len(rows), width, dtype=torch.float16, device=rows.device)
    packed[:, : rows.shape[1]] = rows
    return packed


def _repeats(centroids: Float32[Tensor, "k d"]) -> Tensor:
    """Return which centroids equal one of a lower id."""
    return first_of_equals(centroids) != torch.arange(len(centroids), device=centroids.device)


def _list_of(is_open: Tensor) -> tuple[Int32[Tensor, " m"], Int32[Tensor, " 1"]]:
    """Return the numbers of the open rows, in order, and their count: nothing waits for it."""
    places = is_open.cumsum(0)
    numbers = torch.arange(len(is_open), dtype=torch.int32, device=is_open.device)
    listed = numbers.new_zeros(len(is_open) + 1)
    listed.scatter_(0, torch.where(is_open, places - 1, len(is_open)), numbers)
    return listed[:-1], places[-1:].int()


@functools.cache
def works_on(device: torch.device) -> bool:
    """Return whether Triton is here and its kernels find neighbours on this device."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        if torch.cuda.get_device_capability(device) < TENSOR_CORES:
            return False
        points = torch.eye(3, 20, device=device)
        return FusedNearest(points)(points.flip(0)).tolist() == [2, 1, 0]
    except Exception as error:  # a compiler, a driver, a library that is missing: all kinds
        logging.getLogger("deepclust").warning(
            f"the fused search does not work on {device}: {error!r}. A slower search is used"
        )
        return False
