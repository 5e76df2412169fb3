"""Reader processes that end with the rank, and ignore the signals that are meant for it.

They come from a fork server, because fork hangs once the parent has used torch. The children of a
fork server are not children of this process. So torch's own watchdog, which looks at the parent's
pid, would not notice the end of the rank. Each worker waits on a pipe that only this process holds
open. A worker that was stopped (SIGSTOP) cannot do that: it is killed with the fork server, which
ends with the rank (`fork_server.py`). The workers block signals to a whole process group or job
step. These are for the rank, which needs its workers to finish the step.

A fork server takes seconds to import torch, so it is started before it is needed. A rank that is a
fork itself, and has used nothing yet, forks it. Another process starts it before it imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver, queues, resource_tracker, util
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

_PRELOAD = [
    "deepclust.data.read.fork_server",
    "torch",
    "torchvision",
    "deepclust.data.read.dataset",
]
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
SET_NAME = 15  # PR_SET_NAME: what `ps` and `top` show
LOST_BATCH = 70  # exit code of a worker that could not send a batch


def set_up(ready: connection.Connection, _worker: int) -> None:
    """Give a new worker one thread for torch, and end it with its parent or with a lost batch.

    It says by a byte to `ready` that it is up. That is one write of a pipe, so workers share it.
    """
    import torch  # not at the top: the module is used before torch is imported

    torch.set_num_threads(1)
    # the thread that sends would drop a batch that it cannot pickle, and the rank would wait for it
    queues.Queue._on_queue_feeder_error = staticmethod(_end_with_lost_batch)  # type: ignore[attr-defined]
    threading.Thread(target=_follow_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # nobody waits for it any more
        ready.send_bytes(b"1")


def _end_with_lost_batch(error: Exception, _batch: object) -> None:
    sys.stderr.write(f"a reader process could not send a batch: {type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(LOST_BATCH)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def collect_started(started: list[BaseProcess]) -> Iterator[None]:
    """Add the workers that are started in the block to the list, even when it fails.

    The fork server inherits a signal mask, so its workers do not get the signals `_BLOCKED`. The
    user's script is hidden: without `if __name__ == "__main__"` each worker would run it again,
    and start workers itself. Workers need nothing of it.
    """
    start_fork_server()
    before = set(multiprocessing.active_children())
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        started += set(multiprocessing.active_children()) - before


def start_fork_server() -> None:
    """Start the fork server if there is none, and do not wait for what it imports."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        resource_tracker.ensure_running()  # unblocks two of them when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def fork_the_fork_server() -> None:
    """Start the fork server as a fork of this process, which has one thread and has used no torch.

    Its memory is shared, and its readers are there at once.
    """
    resource_tracker.ensure_running()  # a new interpreter, light
    own: Any = util  # of which the fork server's starter is private
    start, own.spawnv_passfds = own.spawnv_passfds, _fork_instead
    try:
        start_fork_server()
    finally:
        own.spawnv_passfds = start


def _fork_instead(path: bytes, words: Sequence[str], files: Sequence[int]) -> int:
    """Be, in a fork, the new interpreter of a command whose last word is its program."""
    if pid := os.fork():
        return pid
    try:
        ctypes.CDLL(None).prctl(SET_NAME, b"readers", 0, 0, 0)  # it and they look like the rank
        kept = [2, *sorted(files), 1 << 16]
        for low, high in itertools.pairwise(kept):
            os.closerange(low + 1, high)
        exec(words[-1], {})
    finally:
        os._exit(1)


def end(processes: list[BaseProcess]) -> None:
    """Kill the workers that still run (they hold nothing that could be lost) and collect them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=5)


def any_dead(processes: list[BaseProcess], patience: float = 1.0) -> bool:
    """Return whether a worker has died within `patience` seconds, as a broken pipe announces."""
    return bool(processes) and bool(
        connection.wait([process.sentinel for process in processes], timeout=patience)
    )


def explain_dead(processes: list[BaseProcess]) -> str:
    """Return how the dead workers ended, and what to do about it."""
    dead = [process for process in processes if not process.is_alive()]
    listing = ", ".join(f"pid {process.pid} ({_ending(process.exitcode)})" for process in dead)
    return (
        f"a reader process died: {listing or 'unknown'}. If the machine ran out of memory, set "
        "data.workers or train.batch lower. SIGBUS: a file of the index or of the run was cut "
        "short while it was in use, or /dev/shm is too small"
    )


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    if code == LOST_BATCH:
        return "it could not send a batch, see the output of its rank"
    return f"exit {code}"
