"""Copies of tensors between a GPU and the host, through page-locked memory.

What goes to the GPU is not waited for. What comes back is waited for once, or when the host next
waits. torch keeps page-locked memory, and gives it out again at the next copy.
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


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy of host tensors on a GPU, which is not waited for."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def copied_to_host(values: Tensor) -> Tensor:
    """Return a copy that is there when the host next waits for this device."""
    return _pinned(values) if values.is_cuda else values.cpu()


def _pinned(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
