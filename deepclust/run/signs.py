"""Signs of life: when a process last got somewhere, which tells a long stage from a hang."""

from __future__ import annotations

import time

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
