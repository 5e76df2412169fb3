"""One process at a time: a lock file that frees itself when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deepclust.data.shards.remote import Interrupted, never
from deepclust.files import disk_errors

TELL_S = 10.0  # between two lines in the log
_LOOK_S = 0.1


@contextlib.contextmanager
def held(path: Path, purpose: str, stopped: Callable[[], bool] = never) -> Iterator[None]:
    """Hold the lock file while the block lasts; `purpose` says in the log what others do so long.

    Raises `Interrupted` if `stopped` says so while we wait, and `DiskError`.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
        told = time.monotonic()
        while not _taken(file.fileno()):
            if stopped():
                raise Interrupted
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                logging.getLogger("deepclust").info("waiting: another process %s", purpose)
            time.sleep(_LOOK_S)
        yield


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
