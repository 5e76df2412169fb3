"""The rendezvous of a job's tasks: the head listens, and a file in the run holds its address.

The file is keyed by job and restart, so none of an older start is taken for it. Only its owner
can read it: it holds the word that a peer must say. Every peer then keeps its connection, JSON
lines both ways. A side that loses it knows that the other is gone.
"""

from __future__ import annotations

import hmac
import json
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster_jobs.slurm.allocation import Allocation
from deepclust.errors import RequeueWanted, ResourceError
from deepclust.files import append_json, create_empty, disk_errors, read_json, temporary

POLL_S = 0.2
LOOK_S = 2.0  # a thousand tasks look for one file
HELLO_S = 2.0
PATIENCE_S = 10.0
BACKLOG = 4096
SILENCE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


@dataclass
class Line:
    """A connection that carries JSON lines."""

    socket: socket.socket
    rest: bytes = b""
    open: bool = True
    received: list[dict[str, Any]] = field(default_factory=list)  # and not returned yet

    def __post_init__(self) -> None:
        """Set keepalive, so that a machine that falls silent is noticed within half a minute."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in SILENCE:
            self.socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        """Return the file descriptor, for selectors."""
        return self.socket.fileno()

    def send(self, **record: Any) -> None:
        """Send one line.

        Nothing happens when the other side is gone, which `receive` notices.
        """
        with suppress(OSError):
            self.socket.sendall(json.dumps(record).encode() + b"\n")

    def receive(self, patience: float | None = 0.0) -> list[dict[str, Any]]:
        """Return what comes within `patience` seconds (None: no limit); the end clears `open`."""
        if self.received:
            taken, self.received = self.received, []
            return taken
        self.socket.settimeout(patience)
        try:
            data = self.socket.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            data = b""
        finally:
            self.socket.settimeout(None)
        self.open = bool(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def first(self, patience: float | None) -> dict[str, Any] | None:
        """Return the next record; None when the other side goes, or sends nothing for so long."""
        deadline = None if patience is None else time.monotonic() + patience
        while self.open and (deadline is None or time.monotonic() < deadline):
            self.received = self.receive(None if deadline is None else POLL_S)
            if self.received:
                return self.received.pop(0)
        return None

    def close(self) -> None:
        """Let the other side know."""
        self.socket.close()


@dataclass
class Peer:
    """A task that has come: its line, its number, the node it is on, and the fields it sent."""

    line: Line
    task: int
    node: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Head:
    """The listening side, in task 0."""

    server: socket.socket
    secret: str
    notes: Path  # the folder of this start
    peers: dict[int, Peer] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.server.getsockname()[0])

    def note(self, moment: str, when: float | None = None) -> None:
        """Write down when the bring-up came to a moment, in seconds since the epoch."""
        append_json(self.notes / "bring-up.jsonl", {"moment": moment, "time": when or time.time()})

    def gather(
        self, expected: dict[int, str], patience: float, stopping: Callable[[], bool]
    ) -> list[Peer]:
        """Wait for those tasks (number: node), in their order.

        Raises `ResourceError` with the names of the nodes that are missing, `RequeueWanted` when
        we are asked to stop meanwhile.
        """
        deadline = time.monotonic() + patience
        while missing := {t: node for t, node in expected.items() if t not in self.peers}:
            if stopping():
                raise RequeueWanted("asked to stop before all nodes had connected")
            if time.monotonic() > deadline:
                tasks = ", ".join(f"task {task} on {node}" for task, node in missing.items())
                raise ResourceError(
                    f"{tasks} did not connect within slurm.start={patience:g} s; their output is "
                    "in the run's folder slurm/, JOB_TASK_log.out"
                )
            self._accept()
        return [self.peers[task] for task in expected]

    def await_all(self, word: str, patience: float, stopping: Callable[[], bool]) -> None:
        """Wait until every peer has sent a key, or raise `ResourceError` with the others."""
        deadline = time.monotonic() + patience
        while silent := [p for p in self.peers.values() if word not in p.fields]:
            if stopping():
                raise RequeueWanted(f"asked to stop before all nodes were {word}")
            for record in silent[0].line.receive(POLL_S):
                silent[0].fields |= record
            failed = [p for p in silent if "failed" in p.fields or not p.line.open]
            if failed or time.monotonic() > deadline:
                late = f"it is not {word} after {patience:g} s"
                raise ResourceError(
                    "; ".join(f"{p.node}: {p.fields.get('failed', late)}" for p in failed or silent)
                )

    def _accept(self) -> None:
        try:
            connection, _ = self.server.accept()
        except TimeoutError:
            return
        line = Line(connection)
        try:
            fields = line.first(HELLO_S) or {}
            if hmac.compare_digest(str(fields.pop("secret", "")).encode(), self.secret.encode()):
                self.peers[int(fields["task"])] = Peer(line, fields["task"], fields["node"], fields)
                return
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            pass  # not a task of ours
        line.close()

    def close(self) -> None:
        """Close all connections, and stop listening."""
        for peer in self.peers.values():
            peer.line.close()
        self.server.close()


def folder(run: Path, allocation: Allocation) -> Path:
    """Return the folder in which this start of the job leaves its notes."""
    return run / "slurm" / allocation.life


@contextmanager
def hosting(run: Path, allocation: Allocation, address: str) -> Iterator[Head]:
    """Listen, and write down where.

    All connections are closed at the end.
    """
    notes = folder(run, allocation)
    head = Head(socket.create_server((address, 0), backlog=BACKLOG), secrets.token_hex(32), notes)
    head.server.settimeout(POLL_S)
    try:
        with disk_errors(run):
            notes.mkdir(parents=True, exist_ok=True)
            if began := os.environ.get("DEEPCLUST_BEGAN"):
                head.note("job script", float(began))
            head.note("head")
            _, port = head.server.getsockname()
            write_private(notes / "token", head.secret)
            facts = {"address": address, "port": port, "secret": head.secret}
            write_private(notes / "head.json", json.dumps(facts))
        yield head
    finally:
        head.close()
        with suppress(OSError):  # a full disk must not hide why we end
            (notes / "head.json").unlink(missing_ok=True)
            (notes / "token").unlink(missing_ok=True)


def leave(run: Path, allocation: Allocation) -> None:
    """Write down that this start has no head any more, for tasks that come late."""
    with suppress(OSError):
        folder(run, allocation).mkdir(parents=True, exist_ok=True)
        create_empty(folder(run, allocation) / "ended")


def write_private(file: Path, text: str) -> None:
    """Write a file that nobody else can read, and let it appear whole."""
    partial = temporary(file)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    partial.rename(file)


def join(run: Path, allocation: Allocation, patience: float) -> Line | None:
    """Go to the head and say who we are, or None when it has been there and is gone.

    Raises `ResourceError` when it is not to be allocation.
    """
    file, deadline = folder(run, allocation) / "head.json", time.monotonic() + patience
    pause = POLL_S
    while not (file.parent / "ended").exists():
        try:
            facts = read_json(file)
            line = Line(socket.create_connection((facts["address"], facts["port"]), PATIENCE_S))
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{allocation.name} found no head for {patience:g} s: {error}; {file} must be "
                    "on a file system that all nodes share"
                ) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LOOK_S)
            continue
        own = line.socket.getsockname()[0]
        us = {"task": allocation.task, "node": allocation.name, "address": own, "pid": os.getpid()}
        line.send(secret=facts["secret"], **us)
        return line
    return None
