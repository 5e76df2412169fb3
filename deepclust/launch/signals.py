"""Signals that ask a run to stop at a step: collected, and held back while a process starts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
HELD_BACK = set(STOP_SIGNALS)


@contextlib.contextmanager
def collected_signals(earlier: list[int] | None = None) -> Iterator[list[int]]:
    """Collect USR2, TERM and INT instead of dying of them, but let a second INT interrupt.

    They are added to those that came earlier, in the same list.
    """
    asked: list[int] = [] if earlier is None else earlier
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = [signal.signal(number, note) for number in STOP_SIGNALS]
    try:
        yield asked
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Start a process in the block with its signals blocked, until it can handle them itself.

    Importing torch takes seconds, in which a signal would kill it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
