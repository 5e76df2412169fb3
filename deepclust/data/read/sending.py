"""The way of a batch from a reader process to the rank: by shared memory, or else by a pipe.

torch hands images over in /dev/shm. Docker gives it 64 MB by default, which is less than two large
batches. torch meets a full one in a thread that drops the batch, and the rank would wait for ever.
So here the reader itself takes the shared memory. Where that fails, the images go through the pipe
with the rest of the batch, which is slower and gives the same bytes.

An error is sent as a value, so that the rank raises what the reader has raised.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TypeAlias

import torch
from torch.utils.data import Dataset

from deepclust.data.read.dataset import Batches, Loaded, Request
from deepclust.errors import DeepclustError, ResourceError

SHM = "/dev/shm"
REMEDY = f"give {SHM} more (docker run --shm-size=8g, or --ipc=host), or set data.workers lower"
PAGES = (8, 3)  # of semaphores in /dev/shm: of all workers, and of each
TOO_FEW_FILES = (errno.EMFILE, errno.ENFILE)
Sent: TypeAlias = Loaded | DeepclustError


class Sender(Dataset[Sent]):
    """The batches of a reader process, ready to be sent."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, request: Request) -> Sent:
        """Load a batch and share its images, or return the error."""
        try:
            return share(self.batches[request])
        except DeepclustError as error:
            return error
        except (MemoryError, OSError) as error:
            return shortage(error)


def share(loaded: Loaded) -> Loaded:
    """Move the images into shared memory, or make them arrays, which are sent through a pipe."""
    try:
        return loaded.each(lambda tensor: tensor.share_memory_())
    except (RuntimeError, OSError):
        return loaded.each(lambda tensor: tensor.numpy())


def received(loaded: Loaded) -> Loaded:
    """Return the batch with tensors again."""
    return loaded.each(torch.as_tensor)


def pipe_warning(loaded: Loaded) -> str:
    """Return what to do about a small /dev/shm."""
    encoded = 0 if loaded.encoded is None else loaded.encoded.data.nbytes
    needed = (encoded + sum(images.nbytes for images in loaded.images)) / 1e6
    return (
        f"{SHM} has {free_shm() / 1e6:.1f} MB left, too little for batches of {needed:.1f} MB, so "
        "images come through pipes. That is slower and gives the same result. To mend it, "
        f"{REMEDY}."
    )


def check_semaphores(workers: int) -> None:
    """Raise `ResourceError` if there is no room for what processes need to talk at all."""
    needed = (PAGES[0] + PAGES[1] * workers) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "linux" and (free := free_shm()) < needed:
        raise ResourceError(
            f"{workers} reader processes need {needed} bytes of {SHM} for their semaphores, and "
            f"{free} are free: {REMEDY}. data.workers=0 needs none."
        )


def free_shm() -> int:
    """Return the bytes that are free in shared memory, 0 where there is none."""
    try:
        disk = os.statvfs(SHM)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


def lacks_files(error: BaseException) -> bool:
    """Return whether a process had no descriptors left, which torch says in two ways."""
    number, text = getattr(error, "errno", None), str(error)
    return number in TOO_FEW_FILES or "Too many open files" in text or "ancdata" in text


def shortage(error: BaseException) -> ResourceError:
    """Return the error of a process that could not get memory, files or processes, in words."""
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC:
        remedy = f"{SHM} is full: {REMEDY}; data.workers=0 needs none"
    elif lacks_files(error):
        remedy = "too many open files: raise `ulimit -n`, or set data.workers lower"
    else:
        remedy = (
            "no memory or no room for a process: set data.workers or train.batch lower, or raise "
            "the limit (ulimit -v, ulimit -u, the memory of the job)"
        )
    return ResourceError(f"reader processes: {type(error).__name__}: {error}. That is {remedy}.")
