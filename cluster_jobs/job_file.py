"""Files of a run directory about the job that runs it: where it was submitted, a cancel request.

They reach a controller on any host, and all who see the run can read them.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

from deepclust.files import disk_errors, read_json, write_json
from deepclust.run import lock
from deepclust.run.reporting import Formatter

LOCAL = {"on": "local"}


def record(run_dir: Path, **facts: Any) -> None:
    """Write where the run was submitted, and remove an old cancel request."""
    forget_cancel(run_dir)
    write_json(run_dir / "job.json", {"time": time.time(), **facts})


def read(run_dir: Path) -> dict[str, Any]:
    """Return where the run was submitted: `on` and what that executor has recorded."""
    file = run_dir / "job.json"
    return dict(read_json(file)) if file.exists() else dict(LOCAL)


def record_local(run_dir: Path) -> None:
    """Record that a run which was elsewhere before goes on in this process, unless it is held."""
    if (run_dir / "job.json").exists() and lock.owner(run_dir) is None:
        record(run_dir, **LOCAL)


def output(run_dir: Path) -> Path:
    """Return the folder with the output of the job's tasks."""
    return Path(read(run_dir).get("output", run_dir / "slurm"))


def ask_to_cancel(run_dir: Path) -> None:
    """Write a cancel request, which the controller polls for."""
    with disk_errors(run_dir):
        (run_dir / "cancel").touch()


def stopping(run_dir: Path, signals: list[int]) -> bool:
    """Return whether a signal or a cancel request asks us to stop.

    A request counts as SIGINT and is added to the signals.
    """
    if (run_dir / "cancel").exists() and signal.SIGINT not in signals:
        signals.append(signal.SIGINT)
    return bool(signals)


def forget_cancel(run_dir: Path) -> None:
    """Remove the cancel request, if there is one."""
    (run_dir / "cancel").unlink(missing_ok=True)


def log_to(run_dir: Path) -> None:
    """Send a controller's log to the run and to stderr."""
    file = logging.FileHandler(run_dir / "logs" / "controller.log")
    handlers: list[logging.Handler] = [file, logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers)
