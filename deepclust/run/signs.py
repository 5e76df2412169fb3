"""Signs of life: when a process last got somewhere, which tells a long stage from a hang."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

BEAT_S = 1.0  # between two answers of a process to its supervisor


def unwatched() -> None:
    """Do nothing: the sign of life of a process that no supervisor watches."""


class SignsOfLife:
    """The moment at which a process last got somewhere, which is all that `alive` costs."""

    def __init__(self) -> None:
        self._last: float | None = None

    def alive(self) -> None:
        """Note a sign of life."""
        self._last = time.monotonic()

    @property
    def idle_s(self) -> float | None:
        """Seconds since the last sign of life, or None before the first."""
        return None if self._last is None else time.monotonic() - self._last


@contextlib.contextmanager
def computing(alive: Callable[[], None]) -> Iterator[None]:
    """Show signs of life as long as this thread computes, in a call that cannot: LAPACK, a sort.

    A second thread looks at the CPU time of this one every second. One that is stuck, or waits for
    another process, uses none. Not for calls that wait for a GPU, which may spin.
    """
    clock, over = _clock_of_this_thread(), threading.Event()

    def watch() -> None:
        last = time.clock_gettime(clock)
        while not over.wait(BEAT_S):
            now = time.clock_gettime(clock)
            if now - last > BEAT_S / 10:
                alive()
            last = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _clock_of_this_thread() -> int:
    """Return the clock of this thread's CPU time, or of the process's where threads have none."""
    of_thread = getattr(time, "pthread_getcpuclockid", None)
    return of_thread(threading.get_ident()) if of_thread else time.CLOCK_PROCESS_CPUTIME_ID
