"""Safetensors files whose failures are ours: a full disk is an OSError, as everywhere else.

`safetensors.torch.save_file` reports ENOSPC as a SafetensorError; bytes written by Python do not.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors (copied to the CPU, so that none share memory) under their names."""
    whole = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    path.write_bytes(save(whole, metadata))
