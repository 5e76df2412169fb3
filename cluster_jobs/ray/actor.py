"""A process of the worker group on Ray: a trainer rank or the cluster worker, a long-lived actor.

It runs the same rank program as everywhere else (`launch.worker.work`), in a thread. Meanwhile
other threads answer the supervisor with what the rank has reported, and with the age of its last
sign of life. Records are kept until the supervisor has them, so a lost answer loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from deepclust.errors import DataError, DeepclustError, ResourceError, lack_of_memory, redact
from deepclust.files import create_empty, read_json
from deepclust.launch.policy import UNEXPECTED
from deepclust.launch.ports import free_port
from deepclust.launch.role import Role
from deepclust.launch.visible_gpus import MASK, place_of
from deepclust.run.directory import Run
from deepclust.run.reporting import failure
from deepclust.run.signs import SignsOfLife

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
    idle_s: float | None  # since the rank's last sign of life; None before the first
    result: dict[str, Any] | None  # of the rank: None while it works, {} when it ended well


class Worker(SignsOfLife):
    """One process of the worker group.

    Ray's dashboard shows its subclass and its name.
    """

    def __init__(self, run_dir: str) -> None:
        """Import nothing heavy: torch is imported by `work`."""
        super().__init__()
        self.run_dir = Path(run_dir)
        self._records: list[dict[str, Any]] = []
        self._kept_from = 0  # the number of the first record that is still here
        self._result: dict[str, Any] | None = None
        self._something = threading.Condition()
        self._asked = threading.Event()

    def place(self, token: str) -> Place:
        """Return where this is, and whether it sees the lock of the run with this very token."""
        context = ray.get_runtime_context()
        gpus = tuple(str(name) for name in ray.get_gpu_ids())
        ip = ray.util.get_node_ip_address()
        if ip.startswith("127."):  # a cluster of this machine alone: gloo needs no other interface
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        own, problem = own_gpu(gpus)
        problem = _problem(self.run_dir, token) or problem
        return Place(context.get_node_id(), platform.node(), ip, os.getpid(), gpus, problem, own)

    def rendezvous(self) -> str:
        """Return an address of this node that is free now, where rank 0 will listen."""
        ip = ray.util.get_node_ip_address()
        return f"tcp://{ip}:{free_port(ip)}"

    def begin(self, role: Role, token: str, attempt: int) -> None:
        """Start the role's work in a thread and return at once.

        `News.result` is set when the work has ended.
        """
        order = (role, Run(self.run_dir, token, attempt))
        threading.Thread(target=self._work, args=order, daemon=True).start()

    def news(self, have: int, wait_s: float) -> News:
        """Return what was reported beyond the first `have` records; wait if there is nothing."""
        with self._something:
            del self._records[: have - self._kept_from]
            self._kept_from = have
            if not self._records and self._result is None:
                self._something.wait(wait_s)
            return News(list(self._records), self.idle_s, self._result)

    def stop(self) -> None:
        """Ask the rank to stop at its next step."""
        self._asked.set()

    def event(self, name: str, **fields: Any) -> None:
        """Keep an event for the supervisor (`reporting.Report`)."""
        logging.getLogger("deepclust").info("%s %s", name, json.dumps(fields))
        self._keep({"event": name, **fields})

    def progress(self, **fields: Any) -> None:
        """Keep a piece of progress for the supervisor (`reporting.Report`)."""
        logging.getLogger("deepclust").info("step %s", json.dumps(fields))
        self._keep({"progress": True, **fields})

    def _work(self, role: Role, run: Run) -> None:
        """Run the role to its end: {} or {failed, kind, exit_code}."""
        result: dict[str, Any] = {}
        try:
            from deepclust.launch.worker import work  # imports torch

            work(run, role, self, self._asked.is_set)
        except DeepclustError as error:
            result = _failed(error, error.exit_code)
        except BaseException as error:
            logging.getLogger("deepclust").error("%s", redact(traceback.format_exc()))
            lack = lack_of_memory(error)
            result = _failed(error, UNEXPECTED) if lack is None else _failed(lack, lack.exit_code)
        with self._something:
            self._result = result
            self._something.notify()

    def _keep(self, record: dict[str, Any]) -> None:
        with self._something:
            self._records.append(record)
            self._something.notify()


class Trainer(Worker):
    """A trainer rank, under its own name in the dashboard."""


class ClusterWorker(Worker):
    """The cluster worker."""


def _failed(error: BaseException, exit_code: int) -> dict[str, Any]:
    logging.getLogger("deepclust").error("%s: %s", type(error).__name__, error)
    return failure(error, exit_code)


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
