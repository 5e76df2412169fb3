"""Batches reach the rank whatever /dev/shm holds, or the rank is told why not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read import sending, worker_processes
from deepclust.data.read.dataset import Batches, Loaded, Request
from deepclust.data.shards.index import open_index
from deepclust.errors import ResourceError
from tests.images import make_shards

WANTED = Request(np.arange(16), np.arange(16), 0, (Crop(CentreCrop(64, 64)),))
SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from deepclust.data.read.loader import Loader
from deepclust.data.shards.index import open_index
from tests.data.read.test_sending import WANTED
loader = Loader(open_index(sys.argv[1]), 1)
print(*[int(loaded.images[0].long().sum()) for loaded in loader.stream([WANTED] * 3)])
loader.close()
"""


def loaded() -> Loaded:
    images = torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4)
    return Loaded((images, images[:, :, :2, :2]), np.arange(2), np.arange(2))


@pytest.mark.parametrize("full", [True, False])
def test_images_arrive_with_and_without_shared_memory(monkeypatch, full):
    def refuse(images: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    if full:
        monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    sent = sending.share(loaded())
    assert sent.in_pipe is full
    assert sent.pin_memory() is sent if full else sent.images[0].is_shared()
    there = sending.received(sent)
    assert all(torch.equal(a, b) for a, b in zip(there.images, loaded().images, strict=True))


@pytest.mark.slow
@pytest.mark.mount
def test_a_loader_works_in_a_tiny_shared_memory(tmp_path):
    shards = make_shards(tmp_path / "shards", n=16, shards=2)
    inside = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"']
    if subprocess.run([*inside, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount (root)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*inside, "sh", sys.executable, "-c", SCRIPT, str(shards)],
        capture_output=True, text=True, env=environment, timeout=100, check=False,
    )  # fmt: skip
    here = int(Batches(open_index(shards))[WANTED].images[0].long().sum())
    assert done.stdout.split() == [str(here)] * 3, done.stderr
    assert "too little for batches of 0.2 MB" in done.stderr


def test_no_room_for_semaphores_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(sending, "free_shm", lambda: 65536)
    sending.check_semaphores(2)
    with pytest.raises(ResourceError, match=r"81920 bytes of /dev/shm.*--shm-size"):
        sending.check_semaphores(4)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (MemoryError(), "data.workers"),
    ],
)
def test_a_shortage_names_what_to_raise(error, remedy):
    assert remedy in str(sending.shortage(error))


def test_a_reader_that_loses_a_batch_ends(monkeypatch, capsys):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    worker_processes._end_with_lost_batch(OSError("no descriptor"), None)
    assert codes == [worker_processes.LOST_BATCH]
    assert "could not send a batch: OSError: no descriptor" in capsys.readouterr().err
