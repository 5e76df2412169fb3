"""A controller in the background of this machine, free of the shell that began it.

It is a process in its own session. It holds the run's lock, and is found by that lock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from cluster_jobs import job_file
from deepclust.errors import ResourceError, error_of
from deepclust.files import disk_errors, open_append
from deepclust.run import lock

CANCEL_PATIENCE_S = 150.0  # longer than the supervisor gives its ranks (launch.policy)
START_PATIENCE_S = 30.0


def start(run_dir: Path, command: list[str], output: str = "controller.log") -> None:
    """Start a controller and wait until it holds the run, so that status and logs see it.

    Its output goes to that file in `logs/`. Raises the controller's error when it ends at once.
    """
    file = run_dir / "logs" / output
    with disk_errors(file), open_append(file) as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_PATIENCE_S
    while process.poll() is None and lock.owner_pid(run_dir) != process.pid:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if process.poll():
        text = f"{run_dir} ended with exit code {process.returncode}; see {file}"
        raise error_of(process.returncode, text)
    # a server lives longer than its runs, and would keep each in the process table
    threading.Thread(target=process.wait, daemon=True).start()


def stop(run_dir: Path, pid: int) -> str:
    """Ask the controller to stop at its next step, and kill it when it does not.

    Raises `ResourceError` for a process that does not work on the run, whatever its lock says.
    """
    if not lock.works_on(run_dir, pid):
        raise ResourceError(
            f"{run_dir / 'lock.json'} names process {pid}, which has no file of the run open: it "
            f"is not its controller, and was not stopped. If it is, end it with `kill {pid}`."
        )
    job_file.ask_to_cancel(run_dir)  # so that no alarm takes it for a preemption
    try:
        return _end(run_dir, pid)
    finally:
        job_file.forget_cancel(run_dir)


def _end(run_dir: Path, pid: int) -> str:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + CANCEL_PATIENCE_S
    while lock.owner_pid(run_dir) == pid:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return f"{run_dir} did not stop in {CANCEL_PATIENCE_S:.0f} s and was killed"
        time.sleep(0.1)
    return f"{run_dir} was stopped; deepclust resume {run_dir} continues it"
