"""Commands, functions and ranks in forks of one process that has imported everything.

A new interpreter takes five to ten seconds here until it has imported torch, and a run on two ranks
starts four. A fork starts in a moment. It is a process of its own, with its arguments, environment,
descriptors and exit code. Tests that look at processes by their parents or by their command lines
are marked `new_interpreters`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.005
PR_SET_NAME = 15
LONGEST = 1 << 17  # bytes of a request


def run_command(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`deepclust` with these words, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as told, err.open("wb") as failed:
            code = Fork({"words": words, "variables": variables}, told, failed).wait()
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, at module level, in a process of its own; fails where it raises."""
    with tempfile.TemporaryDirectory() as folder:
        given, result, out = Path(folder, "given"), Path(folder, "result"), Path(folder, "out")
        given.write_bytes(pickle.dumps((function, args)))
        request = {"given": str(given), "result": str(result), "variables": dict(os.environ)}
        with out.open("wb") as told:
            code = Fork(request, told, told).wait()
        assert code == 0, f"exit code {code}\n{out.read_text()}"
        return pickle.loads(result.read_bytes())  # what we have just written


class Fork:
    """A fork of the server, with what the supervisor and tests use of `subprocess.Popen`."""

    def __init__(
        self, request: dict[str, Any], stdout: BinaryIO, stderr: BinaryIO, *more: int
    ) -> None:
        self.returncode: int | None = None
        handle, name = tempfile.mkstemp(prefix="forks-")
        os.close(handle)
        self.code = Path(name)
        blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        whole = {"folder": os.getcwd(), "code": name, "blocked": blocked, **request}
        connection = _server()
        fds = [stdout.fileno(), stderr.fileno(), *more]
        socket.send_fds(connection, [json.dumps(whole).encode()], fds)
        self.pid = int(connection.recv(64))

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and (text := self.code.read_text()):
            self.returncode = int(text)
            self.code.unlink()
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        """The exit code; raises `TimeoutExpired` after so many seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(POLL_S)
        return code

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def fork_rank(
    command: list[str], stdout: BinaryIO, stderr: BinaryIO, pass_fds: list[int], process_group: int
) -> Fork:
    """Start a rank or a cluster worker as `launch.local` asks for it."""
    (pipe,) = pass_fds
    request = {"rank": command, "pipe": pipe, "group": process_group, "variables": dict(os.environ)}
    return Fork(request, stdout, stderr, pipe)


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with theirs:
        server = subprocess.Popen(
            command, env=variables, pass_fds=[theirs.fileno()], start_new_session=True
        )
    atexit.register(server.wait, 10)
    atexit.register(ours.close)  # which ends it
    return ours


def _serve(connection: socket.socket) -> None:
    """Fork for every request, and write down exit codes, until the tests end."""
    import deepclust.launch.worker
    import deepclust.pipeline  # noqa: F401

    codes: dict[int, Path] = {}
    connection.settimeout(POLL_S)
    while True:
        with contextlib.suppress(TimeoutError):
            text, fds, _, _ = socket.recv_fds(connection, LONGEST, 3)
            if not text:
                return
            request = json.loads(text)
            pid = _fork(functools.partial(_work, request, fds))
            codes[pid] = Path(request["code"])
            connection.send(str(pid).encode())
            for fd in fds:
                os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes.pop(ended[0]).write_text(str(os.waitstatus_to_exitcode(ended[1])))


def _work(request: dict[str, Any], fds: list[int]) -> int:
    from deepclust.launch import local

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # those of who asks, not of who asked first, for whom the server was started
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if "rank" in request:
        os.setpgid(0, request["group"])
        words = request["rank"]
        words[words.index("--parent") + 1] = str(os.getppid())
        _keep(fds[0], fds[1], fds[2], request["pipe"])
        return _be_rank(words)
    os.setsid()
    _keep(fds[0], fds[1])
    local.subprocess = SimpleNamespace(Popen=_Rank)  # type: ignore[assignment, attr-defined]
    if "words" in request:
        from cluster_jobs import cli

        sys.argv = ["deepclust", *request["words"]]
        cli.main()
        return 0
    function, args = pickle.loads(Path(request["given"]).read_bytes())
    Path(request["result"]).write_bytes(pickle.dumps(function(*args)))
    return 0


def _be_rank(command: list[str]) -> int:
    """Do what the command of a rank does; its name is `rank N` or `cluster worker` for `ps`."""
    from deepclust.launch import local, worker
    from deepclust.launch.role import CLUSTER_WORKER

    number = int(command[command.index("--rank") + 1])
    name = "cluster worker" if number == CLUSTER_WORKER else f"rank {number}"
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
    sys.argv = command[command.index(local.PROGRAM) :]
    return worker.main()


class _Rank:
    """A rank of a run that is itself in a fork: a child of it."""

    def __init__(
        self,
        command: list[str],
        stdout: BinaryIO,
        stderr: BinaryIO,
        pass_fds: list[int],
        process_group: int,
    ) -> None:
        self.returncode: int | None = None
        (pipe,) = pass_fds
        self.pid = _fork(lambda: self._work(command, stdout.fileno(), process_group, pipe))

    def _work(self, command: list[str], out: int, process_group: int, pipe: int) -> int:
        os.setpgid(0, process_group)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _keep(out, out, pipe, pipe)
        return _be_rank(command)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _keep(out: int, err: int, pipe: int | None = None, number: int = 3) -> None:
    """Read nothing, write there, and close all else but a pipe, which gets a number."""
    for ours, theirs in ((os.open(os.devnull, os.O_RDWR), 0), (out, 1), (err, 2)):
        os.dup2(ours, theirs)
    if pipe is not None:
        if pipe != number:
            os.dup2(pipe, number, inheritable=False)
        os.closerange(3, number)
    os.closerange(number + 1 if pipe is not None else 3, 1 << 16)


def _fork(work: Callable[[], int]) -> int:
    """The process id of a fork that does this work and ends with its code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
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


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
