"""What stands in a run about the job that runs it: where it was submitted, and a wish to cancel it.

Both are files of the run directory, so they reach a controller on any host, and anyone who sees
the run can read them.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

from deepclust.files import disk_errors, read_json, write_json
from deepclust.run import lock

LOCAL = {"on": "local"}


def record(run: Path, **facts: Any) -> None:
    """Write down where the run was submitted, and forget an old wish to cancel it."""
    forget_cancel(run)
    write_json(run / "job.json", {"time": time.time(), **facts})


def read(run: Path) -> dict[str, Any]:
    """Where the run was submitted; local if nobody said."""
    file = run / "job.json"
    return dict(read_json(file)) if file.exists() else dict(LOCAL)


def is_local_now(run: Path) -> None:
    """A run that was elsewhere before goes on in this process, unless someone else has it."""
    if (run / "job.json").exists() and lock.owner(run) is None:
        record(run, **LOCAL)


def output(run: Path) -> Path:
    """Where Slurm puts what the run's tasks print."""
    return Path(read(run).get("output", run / "slurm"))


def ask_to_cancel(run: Path) -> None:
    """Leave word for the controller."""
    with disk_errors(run):
        (run / "cancel").touch()


def stopping(run: Path, signals: list[int]) -> bool:
    """Whether a signal asks us to stop, or word to cancel: which counts as an INT from afar."""
    if (run / "cancel").exists() and signal.SIGINT not in signals:
        signals.append(signal.SIGINT)
    return bool(signals)


def forget_cancel(run: Path) -> None:
    """The wish was granted, or is old."""
    (run / "cancel").unlink(missing_ok=True)


def log_to(run: Path) -> None:
    """A controller's log: in the run, and on stderr."""
    where = logging.FileHandler(run / "logs" / "controller.log")
    handlers: list[logging.Handler] = [where, logging.StreamHandler()]
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, handlers=handlers)
