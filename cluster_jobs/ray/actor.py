"""A process of the gang on Ray: a trainer rank or the cluster worker, a long-lived actor.

It runs the same rank program as everywhere else (`launch.worker.work`), in a thread of its own.
Meanwhile others answer the controller: what the rank has told (events, progress, its end), and how
long ago it last came by a point where it could stop. That is the heartbeat; a rank that waits in a
collective for one that hangs has none either, but it still answers, which tells the two apart.
What was told is kept until the controller says that it has it, so a lost answer loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from deepclust.errors import DeepclustError
from deepclust.files import read_json
from deepclust.launch.role import Role
from deepclust.run.directory import Run
from deepclust.run.signs import SignsOfLife


@dataclass(frozen=True)
class Place:
    """Where a member has come up, and whether it sees the run directory."""

    node: str
    host: str
    ip: str
    pid: int
    gpus: tuple[int, ...]
    problem: str = ""  # why the run directory is not usable from here


@dataclass(frozen=True)
class News:
    """What a member has told beyond what the controller has."""

    records: list[dict[str, Any]]
    idle_s: float | None  # since its rank could last have stopped; None until it can first
    result: dict[str, Any] | None  # of the rank: None while it works, {} when it ended well


class Member(SignsOfLife):
    """One process of the gang; Ray's dashboard shows its subclass and its name."""

    def __init__(self, run: str) -> None:
        """Nothing heavy: torch is imported by `work`."""
        super().__init__()
        self.run = Path(run)
        self._told: list[dict[str, Any]] = []
        self._kept_from = 0  # the number of the first record that is still here
        self._result: dict[str, Any] | None = None
        self._something = threading.Condition()
        self._asked = threading.Event()

    def look(self, token: str) -> Place:
        """Where this is, and whether it sees the lock of the run with this very token."""
        context = ray.get_runtime_context()
        gpus = tuple(int(number) for number in ray.get_gpu_ids())
        ip = ray.util.get_node_ip_address()
        if ip.startswith("127."):  # a cluster of this machine alone: gloo needs no other interface
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return Place(
            context.get_node_id(), platform.node(), ip, os.getpid(), gpus, _problem(self.run, token)
        )

    def rendezvous(self) -> str:
        """An address of this node that is free now, where rank 0 will listen."""
        ip = ray.util.get_node_ip_address()
        with socket.create_server((ip, 0)) as server:
            return f"tcp://{ip}:{server.getsockname()[1]}"

    def begin(self, role: Role, token: str, attempt: int) -> None:
        """Start the role's work; its end comes with the news."""
        order = (role, Run(self.run, token, attempt))
        threading.Thread(target=self._work, args=order, daemon=True).start()

    def news(self, have: int, wait_s: float) -> News:
        """What was told beyond the first `have` records; waits that long if there is nothing."""
        with self._something:
            del self._told[: have - self._kept_from]
            self._kept_from = have
            if not self._told and self._result is None:
                self._something.wait(wait_s)
            return News(list(self._told), self.idle_s, self._result)

    def stop(self) -> None:
        """Ask the rank to stop at its next step."""
        self._asked.set()

    def event(self, name: str, **fields: Any) -> None:
        """`metrics.Report`: something that happened once."""
        logging.getLogger("deepclust").info("%s %s", name, json.dumps(fields))
        self._tell({"event": name, **fields})

    def progress(self, **fields: Any) -> None:
        """`metrics.Report`: how far we are."""
        logging.getLogger("deepclust").info("step %s", json.dumps(fields))
        self._tell({"progress": True, **fields})

    def _work(self, role: Role, run: Run) -> None:
        """Run the role to its end: {} or {failed, kind, exit_code}."""
        result: dict[str, Any] = {}
        try:
            from deepclust.launch.worker import work  # torch and all

            work(run, role, self, self._asked.is_set)
        except DeepclustError as error:
            result = self._failed(error, error.exit_code)
        except BaseException as error:
            logging.getLogger("deepclust").error("%s", traceback.format_exc())
            result = self._failed(error, 1)
        with self._something:
            self._result = result
            self._something.notify()

    def _tell(self, record: dict[str, Any]) -> None:
        with self._something:
            self._told.append(record)
            self._something.notify()

    def _failed(self, error: BaseException, exit_code: int) -> dict[str, Any]:
        logging.getLogger("deepclust").error("%s: %s", type(error).__name__, error)
        return {"failed": str(error), "kind": type(error).__name__, "exit_code": exit_code}


class Trainer(Member):
    """A trainer rank, under its own name in the dashboard."""


class ClusterWorker(Member):
    """The cluster worker."""


def _problem(run: Path, token: str) -> str:
    """Why this node cannot work on the run directory; empty when it can."""
    try:
        seen = read_json(run / "lock.json")["token"]
        probe = run / "logs" / f".probe-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"it cannot use {run}: {error.strerror}"
    if seen != token:
        return f"{run} is another folder there, or an old copy of it"
    return ""
