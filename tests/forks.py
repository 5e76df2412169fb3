"""Commands, functions and ranks in forks of one process that has imported everything.

A new interpreter takes five to ten seconds here until it has imported torch, and a run on two ranks
starts four. A fork starts in a moment. It is a process of its own, with its arguments, environment,
descriptors and exit code (`tools/bench/forked.py`). Tests that look at processes by their parents
or by their command lines are marked `new_interpreters`.
"""

from __future__ import annotations

import atexit
import contextlib
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

POLL_S = 0.005
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
    import deepclust.pipeline  # noqa: F401
    from tools.bench.forked import Forked

    running: list[tuple[Forked, Path]] = []
    connection.settimeout(POLL_S)
    while True:
        with contextlib.suppress(TimeoutError):
            text, fds, _, _ = socket.recv_fds(connection, LONGEST, 3)
            if not text:
                return
            request = json.loads(text)
            process = Forked(["fork"], functools.partial(_work, request, fds))
            running.append((process, Path(request["code"])))
            connection.send(str(process.pid).encode())
            for fd in fds:
                os.close(fd)
        for process, file in running:
            if (code := process.poll()) is not None:
                file.write_text(str(code))
        running = [one for one in running if one[0].returncode is None]


def _work(request: dict[str, Any], fds: list[int]) -> int:
    from tools.bench import forked

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    for number in forked.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # those of who asks, not of who asked first, for whom the server was started
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if "rank" in request:
        words = request["rank"]
        words[words.index("--parent") + 1] = str(os.getppid())
        forked.keep_only(*fds, request["pipe"])
        return forked.rank(words, request["group"])
    forked.keep_only(*fds)
    if "words" in request:
        forked.command(request["words"])
        return 0
    forked.fork_ranks()
    function, args = pickle.loads(Path(request["given"]).read_bytes())
    Path(request["result"]).write_bytes(pickle.dumps(function(*args)))
    return 0


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
