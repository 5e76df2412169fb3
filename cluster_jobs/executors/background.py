"""A controller in the background of this machine, free of the shell that began it.

It is a process in a session of its own; it holds the run's lock, and is found again by that lock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from deepclust.errors import RunHeldError, error_of
from deepclust.run import lock

CANCEL_PATIENCE_S = 150.0  # longer than the supervisor gives its ranks (launch.policy)
START_PATIENCE_S = 30.0


def start(run: Path, command: list[str], output: str = "controller.log") -> None:
    """Start a controller and wait until it holds the run, so that status and logs find it.

    What it prints goes to that file in `logs/`. Raises its error when it ends at once.
    """
    file = run / "logs" / output
    with open(file, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_PATIENCE_S
    while process.poll() is None and lock.owner_pid(run) != process.pid:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if process.poll():
        text = f"{run} ended with exit code {process.returncode}; see {file}"
        raise error_of(process.returncode, text)


def refuse_held(run: Path) -> None:
    """Raise `RunHeldError` when somebody runs it already."""
    if owner := lock.owner(run):
        raise RunHeldError(f"{run} is held by {owner}; end it with `deepclust cancel {run}`")


def stop(run: Path, pid: int) -> str:
    """Ask the controller to stop at the next step; kill it when it does not."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + CANCEL_PATIENCE_S
    while lock.owner_pid(run) == pid:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return f"{run} did not stop in {CANCEL_PATIENCE_S:.0f} s and was killed"
        time.sleep(0.1)
    return f"{run} was stopped; deepclust resume {run} continues it"
