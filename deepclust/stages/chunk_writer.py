"""A thread that commits the chunks of an extraction in order, while the next one is extracted.

A commit copies, hashes and forces to disk up to some gigabytes, for which the network would wait.
One chunk is being written at most, so a rank holds two of them. What goes wrong is raised where the
next chunk is handed over, or at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

C = TypeVar("C")


class ChunkWriter(Generic[C]):
    """Writes chunks by `commit(number, chunk)`, and calls `done(number)` in the caller's thread."""

    def __init__(self, commit: Callable[[int, C], None], done: Callable[[int], None]) -> None:
        self.commit, self.done = commit, done
        self._pool = ThreadPoolExecutor(1, "chunks")
        self._pending: tuple[int, Future[None]] | None = None

    def put(self, number: int, chunk: C) -> None:
        """Hand a chunk over, once the one before is on disk."""
        self.settle()
        self._pending = number, self._pool.submit(self.commit, number, chunk)

    def settle(self) -> None:
        """Wait until everything is on disk, or raise what kept it from that."""
        if self._pending is not None:
            (number, future), self._pending = self._pending, None
            future.result()
            self.done(number)

    def __enter__(self) -> ChunkWriter[C]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Settle, unless something went wrong before; the thread has ended in any case."""
        try:
            if error is None:
                self.settle()
        finally:
            self._pool.shutdown()
