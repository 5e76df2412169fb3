"""Ray's daemons on this node: started as our children, and ended as exactly those.

`ray start --block` keeps them as children, so Slurm sees them and they die with us. Never `ray
stop`, which ends every Ray of the user. USR1 and USR2 are ignored from the start, which all they
start inherits: under proctrack/linuxproc Slurm's signals reach the whole tree.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from cluster_jobs.ray.folders import INSIDE, TEMPORARY
from cluster_jobs.slurm.allocation import Allocation
from cluster_jobs.slurm.layout import FIRST_NODE
from deepclust.data.owned_folder import make_folder
from deepclust.errors import ResourceError
from deepclust.files import open_append
from deepclust.launch.ports import free_ports
from deepclust.launch.role import die_with_parent

STORE_BYTES = 200 * 2**20  # nothing of size goes through Ray's object store
STARTED = "Ray runtime started"
POLL_S = 0.2
ANSWER_S = 10.0
LEAVE_S = 2.0  # a raylet drains for up to 30 s; by then we want nothing of it any more
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}


class Daemon:
    """One node's Ray: the head's with the address where it will listen, a follower's with that."""

    def __init__(self, allocation: Allocation, address: str, notes: Path, head: str | None) -> None:
        """Start Ray on this node; its output goes to a file in `notes`.

        `head` is the address where the head's Ray listens, and None on the head itself.
        """
        # Ray lets everybody write to its folder, so that is inside of one that is ours alone
        self.temp = make_folder(TEMPORARY, "dc-job", f"{allocation.job}-")
        self.notes, self.log = notes, notes / f"ray-{allocation.number}.log"
        port, client, agent, agent_rpc, environment, metrics = free_ports(address, 6)
        self.address = head or f"{address}:{port}"
        where = [f"--address={head}"] if head else ["--head", f"--port={port}"]
        if head is None:
            where += [f"--ray-client-server-port={client}", "--include-dashboard=false"]
            where.append(f'--resources={{"{FIRST_NODE}": 1}}')
        self.command = [
            sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *where, "--block",
            f"--node-ip-address={address}",
            f"--num-cpus={allocation.cpus}", f"--num-gpus={allocation.gpus}",
            f"--temp-dir={self.temp / INSIDE}", f"--object-store-memory={STORE_BYTES}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_rpc}",
            f"--runtime-env-agent-port={environment}", f"--metrics-export-port={metrics}",
            "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0",
            "--include-log-monitor=false",
        ]  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if k not in alone("127.")}
        environment_ = {**kept, **QUIET, **private(notes)}
        with open_append(self.log) as out:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment_,
                start_new_session=True, preexec_fn=_deaf,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    @property
    def listens(self) -> bool:
        """Whether the head's Ray can be reached."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), ANSWER_S).close()
        except OSError:
            return False
        return True

    def wait(self, patience: float) -> None:
        """Wait until it is up, or raise `ResourceError` with the end of its log."""
        deadline = time.monotonic() + patience
        while STARTED not in (text := self.log.read_text(errors="replace")):
            if not self.alive or time.monotonic() > deadline:
                raise ResourceError(f"Ray did not start; {self.log} ends with:\n{text[-800:]}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End it and all that it has started."""
        group = self.process.pid
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in members(group):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + LEAVE_S
            while members(group) and time.monotonic() < deadline:
                self.process.poll()
                time.sleep(POLL_S)
        self.process.wait()
        shutil.rmtree(self.temp, ignore_errors=True)


def private(notes: Path) -> dict[str, str]:
    """Return the variables by which a process may use this Ray."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(notes / "token")}


def alone(address: str) -> dict[str, str]:
    """Return what keeps a driver on a loopback Ray: else it goes to the outer address."""
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if address.startswith("127.") else {}


def members(session: int) -> list[int]:
    """Return the processes of a session, without those that have ended."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(folder.name))
    return pids


def _deaf() -> None:
    """Ignore, in the child, what Slurm sends to the task, and die with the task."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    die_with_parent()  # which Ray's children notice, too
