"""Copies of tensors on the host, with one wait for the GPU for all of them.

On a GPU they go to pinned memory, which torch keeps and gives out again at the next copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors on the CPU; one that is there already is not copied."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    copies = [_pinned(tensor) if tensor.device.type == "cuda" else tensor for tensor in tensors]
    device = next(tensor.device for tensor in tensors if tensor.device.type != "cpu")
    torch.cuda.current_stream(device).synchronize()
    return copies


def snapshot(tensors: list[Tensor]) -> list[Tensor]:
    """Return contiguous copies on the host, which no later step changes."""
    on_gpu = [tensor.detach() for tensor in tensors if tensor.device.type == "cuda"]
    moved = iter(to_host(*on_gpu))
    return [
        next(moved)
        if tensor.device.type == "cuda"
        else tensor.detach().clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    ]


def _pinned(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
