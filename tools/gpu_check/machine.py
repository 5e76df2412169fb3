"""The check of the machine: driver, card, memory for workers. The JSON has what there is."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch
from outcome import Outcome, Setting, judged

BATCHES_BYTES = 24 * 256 * 3 * 224 * 224  # of 256 images that readers hold ready


def facts() -> dict[str, Any]:
    """Return driver, card, torch and NCCL, for the JSON."""
    known: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        known |= {
            "gpus": torch.cuda.device_count(), "card": card.name,
            "kind": f"sm_{card.major}{card.minor}", "memory": card.total_memory,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": smi("driver_version"),
        }  # fmt: skip
    return known


def environment(setting: Setting) -> Outcome:
    """Ask for kernels for this card, bfloat16 in hardware, and memory for batches."""
    card = torch.cuda.get_device_properties(setting.device)
    kinds = torch.cuda.get_arch_list()
    has_kernels = any(_covers(kind, card.major, card.minor) for kind in kinds)
    half = card.major >= 8
    shared = os.statvfs("/dev/shm")
    room = shared.f_bavail * shared.f_frsize
    total = float(torch.arange(4.0, device=setting.device).square().sum())
    lacks = [
        *([] if has_kernels else [f"sm_{card.major}{card.minor} is not of {', '.join(kinds)}"]),
        *([] if half else ["no bfloat16 in hardware: set train.precision=fp32"]),
        *([] if room >= BATCHES_BYTES else [f"/dev/shm has {room >> 20} MB: give it 1 GB"]),
        *([] if total == 14.0 else ["it computes wrong sums"]),
    ]
    return judged(not lacks, "; ".join(lacks) or f"{card.name}, kernels, bf16, /dev/shm")


def _covers(kind: str, major: int, minor: int) -> bool:
    """Whether kernels of a kind (sm_80) run on a card: the same major number, no newer minor."""
    number = kind.rpartition("_")[2].rstrip("af")
    return kind.startswith("sm_") and int(number[:-1]) == major and int(number[-1]) <= minor


def smi(field: str) -> str:
    """Ask nvidia-smi for a fact of each card."""
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
