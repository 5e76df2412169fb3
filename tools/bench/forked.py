"""A `deepclust` command in a fork of this process, which has imported everything already.

It starts in a moment where a new interpreter takes seconds. Otherwise it is that command: a session
of its own, its arguments, environment and exit code, and what it says in a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch  # noqa: F401 - imported here for all forks

import deepclust  # noqa: F401
from cluster_jobs import cli

POLL_S = 0.01


class Forked:
    """What the harness uses of `subprocess.Popen`."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self.args, self.returncode = words, None
        handle, name = tempfile.mkstemp(prefix="forked-")
        self.told = Path(name)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, variables, handle)
        os.close(handle)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit code, or raise `TimeoutExpired` after so many seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_S)
        return code

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """Wait, and return what it said."""
        self.wait(timeout)
        text = self.told.read_text(errors="replace") if self.told.exists() else ""
        self.told.unlink(missing_ok=True)
        return "", text

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _become(words: list[str], variables: dict[str, str], told: int) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(variables)
        sys.argv = ["deepclust", *words]
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(told, 2)
        os.dup2(told, 1)
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
