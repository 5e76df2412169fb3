"""Tiles of rows on the host or in a file, copied to a GPU while the tile before is searched.

The host reads a tile into page-locked memory, and a second stream copies it. The stream that uses
it waits for the copy on the device. The host is one tile ahead: it waits for the end of the tile
before the last one. What the last one asks for keeps the GPU busy meanwhile.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.points import Rows
from deepclust.clustering.residence import type_of

AHEAD = 1  # tiles whose work may be queued while another is read; each is on the GPU until then


class TilesAhead:
    """The way of an array's tiles to a GPU, in the order in which they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ends: deque[torch.cuda.Event] = deque()  # of the work that is queued for each tile

    def make_room(self) -> None:
        """Wait until the work of at most `AHEAD` tiles is queued, before the host reads another."""
        self._ends.append(_event(torch.cuda.current_stream(self._device)))
        while len(self._ends) > AHEAD:
            self._ends.popleft().synchronize()

    def send(self, rows: Rows) -> Tensor:
        """Return rows of the host or a file on the GPU, in their own type; nothing waits for it."""
        stream, host = torch.cuda.current_stream(self._device), _page_locked(rows)
        with torch.cuda.stream(self._side):
            there = host.to(self._device, non_blocking=True)
            copied = _event(self._side)
        stream.wait_event(copied)
        there.record_stream(stream)
        return there


def _page_locked(rows: Rows) -> Tensor:
    """Return a copy in page-locked memory, which torch gives out again when it has been copied."""
    host = torch.empty(tuple(rows.shape), dtype=type_of(rows), pin_memory=True)
    if isinstance(rows, Tensor):
        return host.copy_(rows)
    np.copyto(host.numpy(), rows)
    return host


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event that comes after what the stream has to do now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
