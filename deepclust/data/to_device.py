"""Small numbers to a device, without the host waiting for it.

A copy from ordinary memory drains a GPU's queue first. So constants are copied once and kept.
What belongs to a batch goes as one block of page-locked memory, and the host goes on meanwhile. On
a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

_ALIGNED = 16  # bytes: any dtype may begin there


def constant(values: Sequence[float], device: torch.device) -> Float32[Tensor, " m"]:
    """Return fixed numbers on the device: the same tensor each time, which nobody may change."""
    return _constant(tuple(values), device)


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return the arrays as tensors on the device, which share one block there."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return tensors
    sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
    starts = [0, *accumulate(sizes)]
    block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for tensor, start in zip(tensors, starts, strict=False):
        _part(block, start, tensor).copy_(tensor)
    sent = block.to(device, non_blocking=True)
    return [_part(sent, start, like) for like, start in zip(tensors, starts, strict=False)]


def locked(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU so that a copy to the device need not be waited for."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def _part(block: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the place of a tensor in a block of bytes."""
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)


@lru_cache(256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or training could not use what extraction has made
        return torch.tensor(values, dtype=torch.float32, device=device)
