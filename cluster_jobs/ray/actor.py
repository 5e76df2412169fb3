"""An actor of a worker group on Ray: it keeps the process of a trainer rank or cluster worker.

The process is that of every transport (`launch.local`). A rank that is lost begins again in the
same actor, so Ray has nothing to place. The actor answers the supervisor with what the rank has
reported. Records are kept until the supervisor has them, so a lost answer loses nothing.
"""

from __future__ import annotations

import os
import platform
import selectors
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from deepclust.errors import DataError, ResourceError
from deepclust.files import create_empty, read_json
from deepclust.launch.local import EXIT_POLL_S, WorkerProcess
from deepclust.launch.ports import free_port
from deepclust.launch.role import Role
from deepclust.launch.visible_gpus import MASK, place_of
from deepclust.launch.warm import Warm
from deepclust.run.directory import Run

SHARED = "Every node must see the run directory, on a shared file system, under the same path"


@dataclass(frozen=True)
class Place:
    """Where an actor has come up, and whether it sees the run directory."""

    node: str
    host: str
    ip: str
    pid: int
    gpus: tuple[str, ...]  # as Ray names them
    problem: str = ""  # why it cannot work here
    gpu: int | None = None  # its place among those that it sees


@dataclass(frozen=True)
class News:
    """What an actor has reported beyond what the supervisor has."""

    records: list[dict[str, Any]]
    is_over: bool  # the process has ended, and these are the last


class Worker:
    """The keeper of one process of the worker group.

    Ray's dashboard shows its subclass and its name.
    """

    def __init__(self, run_dir: str) -> None:
        """Import nothing heavy: a warm process does, so that the rank can begin again at once."""
        self.run_dir = Path(run_dir)
        # what Ray lets its workers import, its processes may too
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in sys.path if part)
        self._warm = Warm() if sys.platform == "linux" else None
        self._process: WorkerProcess | None = None
        self._something = threading.Condition()
        self._forget()

    def _forget(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._kept_from = 0  # the number of the first record that is still here
        self._is_over = False

    def place(self, token: str) -> Place:
        """Return where this is, and whether it sees the lock of the run with this very token."""
        context = ray.get_runtime_context()
        gpus = tuple(str(name) for name in ray.get_gpu_ids())
        own, problem = own_gpu(gpus)
        problem = _problem(self.run_dir, token) or problem
        ip = ray.util.get_node_ip_address()
        return Place(context.get_node_id(), platform.node(), ip, os.getpid(), gpus, problem, own)

    def rendezvous(self) -> str:
        """Return an address of this node that is free now, where rank 0 will listen."""
        ip = ray.util.get_node_ip_address()
        return f"tcp://{ip}:{free_port(ip)}"

    def begin(self, role: Role, token: str, attempt: int) -> int:
        """Start the process of the role, and return its pid. `News.is_over` tells its end."""
        with self._something:  # `end` waits until the process is there, and kills it
            self._forget()
            run = Run(self.run_dir, token, attempt)
            self._process = process = WorkerProcess(run, role, self._warm)
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        return process.process.pid

    def news(self, have: int, wait_s: float) -> News:
        """Return what was reported beyond the first `have` records; wait if there is nothing."""
        with self._something:
            del self._records[: have - self._kept_from]
            self._kept_from = have
            asked = self._process

            def is_some() -> bool:
                return bool(self._records) or self._is_over or self._process is not asked

            self._something.wait_for(is_some, wait_s)
            return News(list(self._records), self._is_over)

    def stop(self) -> None:
        """Ask the rank to stop at its next step."""
        with self._something:
            if self._process is not None:
                self._process.stop()

    def end(self) -> None:
        """Kill the process, if there is one."""
        with self._something:
            if self._process is not None:
                self._process.kill()
            self._process = None
            self._something.notify_all()

    def _listen(self, process: WorkerProcess) -> None:
        """Keep what the process reports, for the supervisor."""
        while not process.has_ended:
            # `end` closes the pipe
            with suppress(OSError), selectors.DefaultSelector() as selector:
                selector.register(process, selectors.EVENT_READ)
                selector.select(EXIT_POLL_S)
            with self._something:
                if self._process is not process:
                    return
                self._records += process.read()
                self._is_over = process.has_ended
                if self._records or self._is_over:  # each answer costs Ray milliseconds
                    self._something.notify_all()


class Trainer(Worker):
    """A trainer rank, under its own name in the dashboard."""


class ClusterWorker(Worker):
    """The cluster worker."""


def own_gpu(gpus: tuple[str, ...]) -> tuple[int | None, str]:
    """Return the place of this process's GPU among those that it sees, and what is wrong with it.

    A mask that `ray.env` narrows lets Ray name all of it.
    """
    if not gpus:
        return None, ""
    if len(gpus) > 1:
        names = ", ".join(sorted(gpus))
        return None, f"Ray gives it the GPUs {names} at once: unset {MASK} in ray.env"
    try:
        return place_of(gpus[0]), ""
    except ResourceError as error:
        return None, str(error)


def _problem(run_dir: Path, token: str) -> str:
    """Return why this node cannot work on the run directory, or empty when it can."""
    try:
        seen = read_json(run_dir / "lock.json")["token"]
        probe = run_dir / "logs" / f".probe-{platform.node()}-{os.getpid()}"
        create_empty(probe)
        probe.unlink()
    except (OSError, DataError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        return f"it cannot use {run_dir}: {reason}. {SHARED}"
    if seen != token:
        return f"{run_dir} is another folder there, or an old copy of it. {SHARED}"
    return ""
