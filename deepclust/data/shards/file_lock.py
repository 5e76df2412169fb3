"""A lock file: one process at a time, released by the kernel when its holder ends in any way."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deepclust.data.shards.remote import Interrupted, never
from deepclust.files import disk_errors, open_append

TELL_S = 10.0  # seconds between two lines in the log
_POLL_S = 0.1


@contextlib.contextmanager
def held(path: Path, purpose: str, stopped: Callable[[], bool] = never) -> Iterator[None]:
    """Hold the lock file during the block.

    Processes that wait log the holder's `purpose`.

    Raises `Interrupted` if `stopped()` becomes true while waiting, and `DiskError`.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open_append(path))
        logged = time.monotonic()
        while not _try_lock(file.fileno()):
            if stopped():
                raise Interrupted
            if time.monotonic() - logged > TELL_S:
                logged = time.monotonic()
                logging.getLogger("deepclust").info("waiting: another process %s", purpose)
            time.sleep(_POLL_S)
        yield


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
