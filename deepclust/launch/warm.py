"""A warm process: it has imported what a rank needs, and ranks are forks of it.

A new interpreter takes 3 to 10 seconds until it has imported torch. A supervisor starts one warm
process before its first attempt. A rank is there in a moment then, also after a fault. The warm
process has no threads of Python and never touches a GPU, so that forks are safe.

What it starts dies with it, and it ends with the process that has started it. Where there is none
(no Linux, or it was killed) a new interpreter does the same.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from deepclust.launch.role import die_with
from deepclust.launch.signals import held_back

PROGRAM = "deepclust.launch.warm"
RANK = "deepclust.launch.worker"
LATER = (  # what a rank imports when it comes to it
    "deepclust.clustering.compiled_bounds",
    "scipy.optimize",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
)
PATIENCE_S = 120.0  # for the import, from a slow file system
LONGEST = 1 << 17  # bytes of a request
MOST_FILES = 8
SET_NAME = 15  # PR_SET_NAME
OURS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)  # meant for ranks


class Fork:
    """A fork of a warm process, with what is used of `subprocess.Popen`."""

    def __init__(self, pid: int, code_file: int) -> None:
        self.pid, self._code = pid, code_file
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or raise `subprocess.TimeoutExpired` after so many seconds."""
        if (code := self._read(timeout)) is None:
            raise subprocess.TimeoutExpired(f"a fork ({self.pid})", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def _read(self, timeout: float | None) -> int | None:
        """Return the code that the warm process writes last; without one, both were killed."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._code, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return None
            text = os.read(self._code, 32)
            os.close(self._code)
            self.returncode = int(text) if text else -signal.SIGKILL
        return self.returncode


class Warm:
    """A warm process of this one, and how forks of it are asked for."""

    def __init__(self, *modules: str, options: Sequence[str] = ("-P",)) -> None:
        """Start it; it imports `modules`, by default what a rank needs, while we go on."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(PATIENCE_S)
        self._variables = dict(os.environ)
        words = [sys.executable, *options, "-m", PROGRAM, str(theirs.fileno())]
        with theirs, held_back():
            self._process = subprocess.Popen(
                [*words, *(modules or (RANK, *LATER))], pass_fds=[theirs.fileno()], process_group=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def fork(
        self,
        function: str,
        words: Sequence[str],
        files: Sequence[int],
        name: str = "",
        session: bool = False,
    ) -> Fork:
        """Start `function(words, files)`, named as module:function, in a group or session.

        It is there when this returns. `files`: descriptors; the first two are its output and its
        errors. It has our variables, folder and blocked signals of now. `name` is what `ps` and
        `top` show. Raises `OSError` where there is no warm process.
        """
        variables = dict(os.environ)
        changed = {k: v for k, v in variables.items() if self._variables.get(k) != v}
        request = {
            "function": function, "words": list(words), "name": name, "session": session,
            "folder": os.getcwd(),
            "set": changed, "unset": [k for k in self._variables if k not in variables],
            "blocked": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }  # fmt: skip
        text = json.dumps(request).encode()
        if len(text) > LONGEST:
            raise OSError(f"{len(text)} bytes of variables are too many for a warm process")
        code_file, writing = os.pipe()
        try:
            socket.send_fds(self._socket, [text], [writing, *files])
            if not (answer := self._socket.recv(64)):
                raise OSError("the warm process has ended")
        except OSError:
            os.close(code_file)
            self.close()  # or a late answer would start a second process of the role
            raise
        finally:
            os.close(writing)
        return Fork(int(answer), code_file)

    def close(self) -> None:
        """End it and all that it has started."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def warmed(wanted: bool = True) -> Iterator[Warm | None]:
    """Have a warm process in the block; None where none is wanted, or on another system."""
    warm = Warm() if wanted and sys.platform == "linux" else None
    try:
        yield warm
    finally:
        if warm is not None:
            warm.close()


def main() -> None:
    """Import what is named, and serve until the other end is closed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    for module in sys.argv[2:]:
        with suppress(ImportError):  # the fork that needs it says so
            importlib.import_module(module)
    gc.freeze()  # what is imported stays shared with the forks
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(line: socket.socket) -> None:
    """Fork for every request, and write down exit codes."""
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        for one in (line.fileno(), wakes):
            selector.register(one, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wakes in ready:
                os.read(wakes, 4096)
                _collect(running)
            if line.fileno() in ready:
                text, files, _, _ = socket.recv_fds(line, LONGEST, MOST_FILES)
                if not text:
                    return
                code_file, *rest = files
                pid = _fork(json.loads(text), rest)
                running[pid] = code_file
                line.send(str(pid).encode())
                for file in rest:
                    os.close(file)


def _collect(running: dict[int, int]) -> None:
    """Write down the exit codes of those that have ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code_file = running.pop(pid)
            with suppress(BrokenPipeError):
                os.write(code_file, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(code_file)


def _fork(request: dict[str, Any], files: list[int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        end_with(lambda: _become(request, files, parent))
    if not request["session"]:
        with suppress(OSError):  # it does the same; the first of both wins
            os.setpgid(pid, pid)
    return pid


def _become(request: dict[str, Any], files: list[int], parent: int) -> Any:
    """Be, in the child, what was asked for."""
    die_with(parent)
    if request["session"]:
        os.setsid()
    else:
        os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["folder"])
    for name in request["unset"]:
        os.environ.pop(name, None)
    os.environ.update(request["set"])
    if request["name"]:
        ctypes.CDLL(None).prctl(SET_NAME, request["name"].encode(), 0, 0, 0)
    _keep_only(files)
    module, _, function = request["function"].partition(":")
    called: Callable[..., Any] = getattr(importlib.import_module(module), function)
    # those of who asks, and not what the warm process blocks
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    return called(request["words"], files[2:])


def _keep_only(files: list[int]) -> None:
    """Write to the first two, and close all that is not given."""
    for file, number in zip(files[:2], (1, 2), strict=True):
        os.dup2(file, number)
    kept = [2, *sorted(files[2:]), 1 << 16]
    for low, high in itertools.pairwise(kept):
        os.closerange(low + 1, high)


def end_with(work: Callable[[], Any]) -> None:
    """End this process with what `work` returns or raises, as an interpreter would."""
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
    main()
