"""Where the rows of points lie: in the memory of their device if they fit there, else as given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from deepclust.clustering.points import Rows, as_tensor
from deepclust.clustering.tile_sizes import MAX_TILE_ROWS
from deepclust.clustering.tiles import do_nothing


def _free_on_gpu(device: torch.device) -> int:
    """Return the bytes that rows may take: most of what is free, with what torch keeps unused."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(0.8 * free)


MEMORY: dict[str, Callable[[torch.device], int]] = {"cuda": _free_on_gpu}  # apart from the host's


def resident(rows: Rows, device: torch.device, alive: Callable[[], None]) -> Rows:
    """Return rows that can be sliced cheaply: on the GPU if they fit there, else where they are."""
    free = MEMORY.get(device.type)
    if free is not None and not is_on(rows, device):
        return copied(rows, device, alive) if rows.nbytes < free(device) else rows
    if isinstance(rows, np.ndarray) and rows.flags.writeable and rows.flags.c_contiguous:
        return torch.from_numpy(rows) if rows.dtype.isnative else rows  # shares memory
    return rows.detach() if isinstance(rows, Tensor) else rows


def is_on(rows: Rows, device: torch.device) -> bool:
    """Return whether rows are in the memory of this device."""
    return isinstance(rows, Tensor) and rows.device.type == device.type


def type_of(rows: Rows) -> torch.dtype:
    """Return the type of rows, of a memory map too, whose own type NumPy gives."""
    return as_tensor(rows[:0]).dtype


def copied(
    rows: Rows,
    device: torch.device,
    alive: Callable[[], None] = do_nothing,
    ids: Int64[np.ndarray, " m"] | None = None,
) -> Tensor:
    """Return a copy on the device, of all rows or some, made in pieces: it may not fit the host."""
    n = len(rows) if ids is None else len(ids)
    copy = torch.empty((n, *rows.shape[1:]), dtype=type_of(rows), device=device)
    for start in range(0, n, MAX_TILE_ROWS):
        piece = slice(start, start + MAX_TILE_ROWS)
        copy[piece] = as_tensor(rows[piece if ids is None else ids[piece]])
        alive()
    return copy
