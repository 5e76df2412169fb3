"""How long a batch is awaited: nobody here waits without end for another process.

A reader process may hang, be stopped (SIGSTOP), or sit on a storage that does not answer. The rank
that waits for it must still hear a request to stop, and must end by itself where nobody watches it.
torch waits for its workers as long as they live. So a thread looks at the clock, and kills them
when the wait is over. torch notices that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from deepclust.data.shards.remote import never
from deepclust.errors import DeepclustError, RequeueWanted, ResourceError

LIMIT_S = 1200.0  # twice `train.hang`, so that a supervisor comes first where there is one
START_S = 300.0  # for reader processes to come up, as `policy.start` for ranks: they import torch
STOP_S = 20.0  # for a batch after a request to stop: a step is finished if that is possible
LOOK_S = 0.5


class Patience:
    """The limits of a wait, and when the present one began.

    `alive` shows that this process gets somewhere. It is called while readers come up.
    """

    def __init__(
        self,
        stopping: Callable[[], bool] = never,
        limit_s: float = LIMIT_S,
        alive: Callable[[], object] = never,
    ) -> None:
        self.stopping, self.limit_s, self.alive = stopping, limit_s, alive
        self._up: Connection | None = None  # from readers that come up
        self._began: float | None = None
        self._asked: float | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as one wait, or as a part of the one around it."""
        if self._began is not None:
            yield
            return
        self._began, self._asked = time.monotonic(), None
        try:
            yield
        finally:
            self._began = None

    def let_start(self, up: Connection, readers: int) -> None:
        """Show life until as many readers have sent a byte, and allow `START_S` for it."""
        self._up = up
        threading.Thread(target=self._await_start, args=(up, readers), daemon=True).start()

    @property
    def starting(self) -> bool:
        """Whether readers come up."""
        return self._up is not None

    def end_start(self) -> None:
        """Wait no longer for readers that come up."""
        self._up = None

    def _await_start(self, up: Connection, readers: int) -> None:
        deadline = time.monotonic() + START_S
        with contextlib.suppress(EOFError, OSError):  # a killed reader never says that it is up
            while self._up is up and readers and time.monotonic() < deadline:
                self.alive()
                if up.poll(LOOK_S):
                    up.recv_bytes()
                    readers -= 1
        if self._up is up:  # not that of readers which were started since
            self._up = None

    def end(self) -> DeepclustError | None:
        """Return why the present wait is over, or None while it may go on."""
        now, began = time.monotonic(), self._began
        if began is None:
            return None
        if self._asked is None and self.stopping():
            self._asked = now
        if self._asked is not None and now - self._asked > STOP_S:
            return RequeueWanted(
                f"asked to stop, and no images came for {STOP_S:g} s; resume goes on from the last "
                "checkpoint"
            )
        limit = max(self.limit_s, START_S) if self.starting else self.limit_s
        if now - began > limit:
            return ResourceError(
                f"no images came for {limit:g} s (2 x train.hang). Look at the storage of "
                "the shards and at the memory of this machine, then resume."
            )
        return None

    def check(self) -> None:
        """Raise the error that ends the present wait, if there is one."""
        if (error := self.end()) is not None:
            raise error


class Watch:
    """A thread that kills reader processes when the wait for them is over, even stopped ones."""

    def __init__(self, processes: list[BaseProcess], patience: Patience) -> None:
        self.reason: DeepclustError | None = None
        self._processes, self._patience = processes, patience
        self._left = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._left.set()

    def _look(self) -> None:
        while not self._left.wait(LOOK_S):
            if (error := self._patience.end()) is None:
                continue
            self.reason = _with_states(error, self._processes)
            for process in self._processes:
                process.kill()
            return


def _with_states(error: DeepclustError, processes: list[BaseProcess]) -> DeepclustError:
    """Add what the readers do, by the kernel's letter: T is stopped, D waits for a storage."""
    states = ", ".join(f"pid {process.pid} {_state(process.pid)}" for process in processes)
    return type(error)(f"{error} Reader processes: {states}.")


def _state(pid: int | None) -> str:
    words = {"T": "is stopped by a signal", "D": "waits for a disk or network", "R": "computes"}
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "has ended"
    return words.get(letter, "sleeps")
