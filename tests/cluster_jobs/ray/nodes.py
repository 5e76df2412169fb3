"""A Ray cluster of several nodes on this machine, and a controller on it, for tests and benches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from deepclust import Recipe
from deepclust.launch.start import prepare_run
from deepclust.run.directory import Run

STORE = 80 * 2**20  # bytes of a node's object store, the least that Ray takes
PATIENCE_S = 300.0


class Nodes:
    """A head without CPUs and nodes of one CPU each, so that every member has its own."""

    def __init__(self, count: int, dashboard: bool = False) -> None:
        head = {"num_cpus": 0, "include_dashboard": dashboard}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, **_own()})
        for _ in range(count):
            self.add()
        if dashboard:
            self._await_dashboard()

    def _await_dashboard(self) -> None:
        """Ray Jobs are taken a while after the nodes stand."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                JobSubmissionClient(self.address).list_jobs()
                return
            except (ConnectionError, RuntimeError):
                assert time.monotonic() < deadline, "the dashboard never came up"
                time.sleep(0.2)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cpus: int = 1) -> Any:
        return self.cluster.add_node(num_cpus=cpus, **_own())

    def add_process(self, command: list[str]) -> subprocess.Popen[bytes]:
        """A node that is started by `ray start`, and stands when it is counted."""
        before, mine = self.count(), _own()
        started = subprocess.Popen(
            [*command, f"--address={self.address}", "--disable-usage-stats",
             f"--object-store-memory={STORE}",
             f"--dashboard-agent-listen-port={mine['dashboard_agent_listen_port']}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while self.count() == before:
            assert started.poll() is None, "the node ended"
            assert time.monotonic() < deadline, "the node never came up"
            time.sleep(0.2)
        return started

    def count(self) -> int:
        """How many nodes stand, the head too."""
        return len(self.cluster.global_state._live_node_ids())

    def remove(self, node_id: str) -> None:
        """Kill a node's raylet, as a power cut would."""
        nodes = self.cluster.list_all_nodes()
        node = next(n for n in nodes if n.node_id.startswith(node_id))
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.cluster.shutdown()


def _own() -> dict[str, int]:
    """A small store, and a port for the node's agent that no other cluster here has."""
    with socket.create_server(("", 0)) as server:
        return {
            "object_store_memory": STORE,
            "dashboard_agent_listen_port": server.getsockname()[1],
        }


def controller(nodes: Nodes | None, run: Path) -> subprocess.Popen[str]:
    """A controller for a run that has been prepared, as its Ray job would start it.

    Without nodes it starts a Ray for itself.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_ADDRESS": nodes.address} if nodes else {}
    return subprocess.Popen(
        [sys.executable, "-m", "cluster_jobs.ray.controller", str(run)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def begin(nodes: Nodes, recipe: Recipe, run: Path) -> subprocess.Popen[str]:
    """Prepare a run and start its controller."""
    prepare_run(recipe, run)
    return controller(nodes, run)


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the controller, check its exit code; what it has printed."""
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{output}"
    return output


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of that name."""
    return [event for event in Run(run).events() if event["event"] == name]


def until(process: subprocess.Popen[str], moment: Callable[[], Any]) -> None:
    """Wait for a moment of the run."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert process.poll() is None, f"the run ended before:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.001)


def placed_at(run: Path, who: str) -> dict[str, Any]:
    """Where a process of the newest attempt is."""
    placed = events(run, "placed")[-1]["members"]
    return next(dict(member) for member in placed if member["who"] == who)


def send(run: Path, who: str, number: int) -> None:
    """A signal to a process of the newest attempt."""
    os.kill(placed_at(run, who)["pid"], number)
