"""On which card kernels of Triton are launched: on torch's present one, wherever their rows are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor


@contextlib.contextmanager
def launches(module: ModuleType, *kernels: str) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """The shapes of tensors whose card is the present one at each launch; nothing is computed."""
    present: list[Tensor] = []
    seen: dict[str, list[tuple[int, ...]]] = {}

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        present.append(tensor)
        yield
        present.pop()

    def launched(name: str) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            seen.setdefault(name, []).extend(tuple(tensor.shape) for tensor in present)

        return MagicMock(__getitem__=lambda self, grid: launch)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "device_of", device_of))
        for name in kernels:
            stack.enter_context(patch.object(module, name, launched(name)))
        yield seen
