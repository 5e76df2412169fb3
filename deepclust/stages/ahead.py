"""Batches made ahead: copied to a GPU and viewed there while the batches before them are used.

Training makes a `Batch` of what was loaded, an extraction a tensor of images.

It happens on a second stream, two batches deep. The stream that uses a batch waits for it on
the device, and the host for neither. On a CPU each batch is made when it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

from deepclust.data.read.loader import Loaded
from deepclust.methods.base import Batch

M = TypeVar("M", Batch, Tensor)
DEPTH = 2


@dataclass(frozen=True)
class Ready(Generic[M]):
    """A batch, what it was loaded as, and the event after which it is on the device."""

    loaded: Loaded
    batch: M
    made: torch.cuda.Event | None = None


class Ahead(Generic[M]):
    """An iterator over the batches of a stream of loaded images, in its order."""

    def __init__(
        self, loaded: Iterator[Loaded], make: Callable[[Loaded], M], device: torch.device
    ) -> None:
        self._make: Callable[[Loaded], M] = make
        self._loaded, self._device = loaded, device
        self._ready: deque[Ready[M]] = deque()
        self._failed: Exception | None = None  # in what comes after the ready ones
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Ready[M]]:
        return self

    def __next__(self) -> Ready[M]:
        if self._side is None:
            loaded = next(self._loaded)
            return Ready(loaded, self._make(loaded))
        self._fill(self._side)
        if self._ready:
            return self._handed_over(self._ready.popleft())
        raise self._failed or StopIteration

    def _fill(self, side: torch.cuda.Stream) -> None:
        """Begin the next batches; an error in them waits for those before it."""
        missing = 0 if self._failed else DEPTH + 1 - len(self._ready)
        try:
            with torch.cuda.stream(side):  # a loader may decode on it
                for loaded in islice(self._loaded, missing):
                    batch = self._make(loaded)
                    made = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    made.record()
                    self._ready.append(Ready(loaded, batch, made))
        except Exception as error:
            self._failed = error

    def _handed_over(self, ready: Ready[M]) -> Ready[M]:
        """Let the present stream wait for a batch, and keep its memory until that has used it."""
        stream = torch.cuda.current_stream(self._device)
        assert ready.made is not None
        stream.wait_event(ready.made)
        for tensor in _tensors(ready.batch):
            if tensor is not None:
                tensor.record_stream(stream)
        return ready


def _tensors(made: Batch | Tensor) -> tuple[Tensor | None, ...]:
    """Return what of a batch is on the device."""
    if isinstance(made, Tensor):
        return (made,)
    return (*made.crops, made.turns, made.pseudo_labels, made.labels, made.soft)
