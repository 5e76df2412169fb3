"""The GPUs that this process may see, and torch's number of one of them.

Ray names a GPU by its text in CUDA_VISIBLE_DEVICES ("4", "GPU-8a...", "MIG-..."). Without that mask
it gives the number on the machine. Slurm gives the place among those that the job has. Torch counts
from 0 what the mask leaves, so its number is a place in the mask.
"""

from __future__ import annotations

import os

from deepclust.errors import ResourceError

MASK = "CUDA_VISIBLE_DEVICES"
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of Linux, and of Linux inside Windows
NOTHING = ("", "-1", "NoDevFiles")  # entries at which CUDA stops reading the mask


def gpus_here() -> int:
    """Return how many GPUs torch would see; without a driver torch is not even imported."""
    if not any(os.path.exists(file) for file in DRIVERS):
        return 0
    import torch  # slow

    return torch.cuda.device_count()


def visible() -> list[str] | None:
    """Return the entries of the mask that count, as text, or None without a mask."""
    mask = os.environ.get(MASK)
    if mask is None:
        return None
    entries = [entry.strip() for entry in mask.split(",")]
    end = next((at for at, entry in enumerate(entries) if entry in NOTHING), len(entries))
    return entries[:end]


def place_of(gpu: str) -> int:
    """Return the place of the GPU that a scheduler names, among those that this process sees.

    Raises `ResourceError` for one that the mask hides.
    """
    entries = visible()
    if entries is None and gpu.isdecimal():
        return int(gpu)
    if entries is not None and gpu in entries:
        return entries.index(gpu)
    mask = "not set" if entries is None else repr(os.environ[MASK])
    raise ResourceError(
        f"the scheduler gives GPU {gpu}, which this process does not see ({MASK} is {mask}). Unset "
        f"{MASK} in ray.env, slurm.setup and the shell that starts Ray, or let it list that GPU"
    )


def number_of(place: int) -> int:
    """Return torch's number of the GPU at that place among the visible ones.

    A process sees only the first MIG instance of its mask, so the mask is narrowed to the one that
    is meant. Call it before CUDA is used. A task of Slurm that sees a single GPU has it alone.
    """
    entries = visible()
    if entries is None:
        return place
    if place < len(entries) and entries[place].startswith("MIG-"):
        os.environ[MASK] = entries[place]
        return 0
    return 0 if len(entries) == 1 else place
