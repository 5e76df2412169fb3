"""Safetensors files whose failures are ours: a full disk is an OSError, as everywhere else.

`safetensors.torch.save_file` reports ENOSPC as a SafetensorError; bytes written by Python do not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors under their names: copied to the CPU, in plain layout, none sharing memory."""
    whole = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    path.write_bytes(save(whole, metadata))
