"""Worker processes that outlive neither their parent nor its signals' purpose.

Workers come from a fork server (fork hangs once the parent has used torch), whose children are
not children of ours: torch's own watchdog, which looks at the parent's pid, would never see us
die. Each worker therefore waits on the pipe that only this process holds open. Signals to a whole
process group or job step (Ctrl-C, Slurm's USR2 and TERM) are for the rank, which finishes its
step with the workers' help: they never see them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from types import ModuleType

import torch

_PRELOAD = ["torch", "torchvision", "deepclust.data.read.dataset"]
_NOT_FOR_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def set_up(_worker: int) -> None:
    """In a new worker: one thread for torch, and an end when the parent ends."""
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def starting() -> Iterator[list[BaseProcess]]:
    """While workers are started: yield a list that holds them afterwards.

    The fork server inherits a signal mask, so its workers are deaf to `_NOT_FOR_WORKERS`; and the
    user's script is hidden, for it would be run again in each worker and start workers itself
    where it has no `if __name__ == "__main__"`. Workers need nothing of it.
    """
    _start_fork_server()
    before = set(multiprocessing.active_children())
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    started: list[BaseProcess] = []
    try:
        yield started
    finally:
        sys.modules["__main__"] = main
        started += set(multiprocessing.active_children()) - before


def _start_fork_server() -> None:
    multiprocessing.set_forkserver_preload(_PRELOAD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        resource_tracker.ensure_running()  # unblocks two of them when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end(processes: list[BaseProcess]) -> None:
    """Kill the workers that still run (they hold nothing that could be lost) and collect them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=5)


def any_dead(processes: list[BaseProcess], patience: float = 1.0) -> bool:
    """Whether a worker has died; a broken pipe can be seen `patience` seconds before its death."""
    return bool(processes) and bool(
        connection.wait([process.sentinel for process in processes], timeout=patience)
    )


def why_dead(processes: list[BaseProcess]) -> str:
    """What became of the workers that are not alive, and what to do about it."""
    dead = [process for process in processes if not process.is_alive()]
    listing = ", ".join(f"pid {process.pid} ({_ending(process.exitcode)})" for process in dead)
    return (
        f"a reader process died: {listing or 'unknown'}. If the machine ran out of memory, set "
        "data.workers or train.batch lower; if SIGBUS, /dev/shm is too small"
    )


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit {code}"
