"""A `deepclust` command, and its ranks, in forks of this process, which has imported everything.

They start in a moment where new interpreters take seconds each. Otherwise a command is as it is: a
session of its own, its arguments, environment, exit code and descriptors, and its readers are
processes that begin from nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster_jobs import cli
from deepclust.launch import warm

POLL_S = 0.01


class Forked:
    """What the harness and the supervisor use of `subprocess.Popen`."""

    def __init__(self, words: list[str], work: Callable[[], Any]) -> None:
        self.args = words
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            warm.end_with(work)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Return the exit code, or raise `TimeoutExpired` after so many seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class ForkedCommand(Forked):
    """A command of ours, whose words go into a file."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        handle, name = tempfile.mkstemp(prefix="forked-")
        self.told = Path(name)
        super().__init__(words, lambda: _command(words, variables, handle))
        os.close(handle)

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """Wait, and return what it said."""
        self.wait(timeout)
        text = self.told.read_text(errors="replace") if self.told.exists() else ""
        self.told.unlink(missing_ok=True)
        return "", text


def _command(words: list[str], variables: dict[str, str], told: int) -> None:
    os.environ.update(variables)
    keep_only(told, told)
    os.setsid()
    command(words)


def command(words: list[str]) -> None:
    """Be the command `deepclust` with these words."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["deepclust", *words]
    fork_ranks()
    cli.main()


def fork_ranks() -> None:
    """Let the ranks of runs that this process starts be forks of a fork of it."""
    warm.Warm = WarmFork  # type: ignore[misc]


class WarmFork(warm.Warm):
    """A warm process that need not import anything: it is a fork of this one."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._variables = dict(os.environ)
        with theirs:
            self.server = Forked(["warm"], lambda: self._serve(theirs))

    def _serve(self, line: socket.socket) -> None:
        self._socket.close()
        signal.pthread_sigmask(signal.SIG_BLOCK, warm.OURS)
        warm.serve(line)

    def close(self) -> None:
        """End it and all that it has started."""
        self._socket.close()
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()


def keep_only(out: int, err: int) -> None:
    """Read nothing, write there, and close all else."""
    for ours, theirs in ((os.open(os.devnull, os.O_RDWR), 0), (out, 1), (err, 2)):
        os.dup2(ours, theirs)
    os.closerange(3, 1 << 16)
