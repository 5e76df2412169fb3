"""Take turns with other long work here: a lock on a file, held for two minutes at a time."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

TURN_S = 120.0


class Turns:
    """The lock of a file, which is given to others between two tries when its time is over."""

    def __init__(self, lock: Path | None) -> None:
        self.file = open(lock, "a") if lock else None  # noqa: SIM115 - held as long as this process
        self.began: float | None = None

    def next(self) -> None:
        """Hold the lock for the next try; without a file do nothing."""
        if self.file is None or (self.began and time.monotonic() - self.began < TURN_S):
            return
        fcntl.flock(self.file, fcntl.LOCK_UN)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.began = time.monotonic()
