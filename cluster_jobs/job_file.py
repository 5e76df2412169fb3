"""Files of a run directory about the job that runs it: where it was submitted, a cancel request.

They reach a controller on any host, and all who see the run can read them.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from deepclust.files import create_empty, disk_errors, read_record, write_json
from deepclust.run import lock
from deepclust.run.reporting import AppendingHandler, Formatter

LOCAL = {"on": "local"}
FIELDS = {  # of job.json, where it has them
    "on": str,
    "time": (int, float, None),
    "job": (str, int, None),
    **dict.fromkeys(("address", "submission", "output"), (str, None)),
}
MOST = 2**20  # bytes of job.json


def record(run_dir: Path, **facts: Any) -> None:
    """Write where the run was submitted, and remove an old cancel request."""
    forget_cancel(run_dir)
    write_json(run_dir / "job.json", {"time": time.time(), **facts})


def read(run_dir: Path) -> dict[str, Any]:
    """Return where the run was submitted: `on` and what that executor has recorded.

    Raises `DataError` for a damaged file. What a `job` may look like, its executor knows.
    """
    file = run_dir / "job.json"
    if not os.path.lexists(file):
        return dict(LOCAL)
    return read_record(file, FIELDS, MOST)


def record_local(run_dir: Path) -> None:
    """Record that a run which was elsewhere before goes on in this process, unless it is held."""
    if (run_dir / "job.json").exists() and lock.owner(run_dir) is None:
        record(run_dir, **LOCAL)


def output(run_dir: Path) -> Path:
    """Return the folder with the output of the job's tasks."""
    return Path(read(run_dir).get("output", run_dir / "slurm"))


def ask_to_cancel(run_dir: Path) -> None:
    """Write a cancel request, which the controller polls for."""
    create_empty(run_dir / "cancel")


def stopping(run_dir: Path, signals: list[int]) -> bool:
    """Return whether a signal or a cancel request asks us to stop.

    A request counts as SIGINT and is added to the signals.
    """
    if (run_dir / "cancel").exists() and signal.SIGINT not in signals:
        signals.append(signal.SIGINT)
    return bool(signals)


def forget_cancel(run_dir: Path) -> None:
    """Remove the cancel request, if there is one."""
    with disk_errors(run_dir):
        (run_dir / "cancel").unlink(missing_ok=True)


def log_to(run_dir: Path) -> None:
    """Send a controller's log to the run and to stderr."""
    with disk_errors(run_dir):
        file = AppendingHandler(run_dir / "logs" / "controller.log")
    handlers: list[logging.Handler] = [file, logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers)
