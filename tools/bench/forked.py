"""A `deepclust` command, and its ranks, in forks of this process, which has imported everything.

They start in a moment where new interpreters take seconds each. Otherwise a command is as it is: a
session of its own, its arguments, environment, exit code and descriptors, and its readers are
processes that begin from nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from cluster_jobs import cli
from deepclust.launch import local, worker
from deepclust.launch.role import CLUSTER_WORKER

POLL_S = 0.01
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
PR_SET_NAME = 15


class Forked:
    """What the harness and the supervisor use of `subprocess.Popen`."""

    def __init__(self, words: list[str], work: Callable[[], Any]) -> None:
        self.args = words
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _end_with(work)

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
    command(words)


def command(words: list[str]) -> None:
    """Be the command `deepclust` with these words, in a session of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["deepclust", *words]
    fork_ranks()
    cli.main()


def fork_ranks() -> None:
    """Let the ranks of runs that this process starts be forks of it."""
    local.subprocess = SimpleNamespace(Popen=start_rank)  # type: ignore[assignment, attr-defined]


def start_rank(
    command: list[str], stdout: BinaryIO, stderr: BinaryIO, pass_fds: list[int], process_group: int
) -> Forked:
    """Start a rank or a cluster worker as `launch.local` asks for it."""
    (pipe,) = pass_fds

    def work() -> int:
        keep_only(stdout.fileno(), stderr.fileno(), pipe, pipe)
        return rank(command, process_group)

    return Forked(command, work)


def rank(command: list[str], process_group: int) -> int:
    """Be what the command of a rank is. `ps` shows it as `rank N` or `cluster worker`."""
    os.setpgid(0, process_group)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    number = int(command[command.index("--rank") + 1])
    name = "cluster worker" if number == CLUSTER_WORKER else f"rank {number}"
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
    sys.argv = command[command.index(local.PROGRAM) :]
    return worker.main()


def keep_only(out: int, err: int, pipe: int | None = None, number: int = 2) -> None:
    """Read nothing, write there, and close all else but a pipe, which gets a number."""
    for ours, theirs in ((os.open(os.devnull, os.O_RDWR), 0), (out, 1), (err, 2)):
        os.dup2(ours, theirs)
    if pipe is not None and pipe != number:
        os.dup2(pipe, number, inheritable=False)
    os.closerange(3, number)
    os.closerange(number + 1, 1 << 16)


def _end_with(work: Callable[[], Any]) -> None:
    code = 1
    try:
        code = int(work() or 0)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
