"""The trackers of a run (`track`), fed by a process beside it that reads what the run writes.

So a tracker that is slow, hangs or fails costs the run nothing. The process ends with its parent,
and what it could not send before that is sent when the run is resumed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from deepclust.errors import DataError, ResourceError
from deepclust.files import disk_errors, open_append, read_json
from deepclust.run.directory import Run

PROGRAM = "deepclust.launch.trackers.follow"
PATIENCE_S = {True: 60.0, False: 10.0}  # for the rest of a run that has finished, or was stopped
REST_S = 600.0  # where nothing else is left to do
NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
MLFLOW_STORE = ("sqlalchemy", "alembic")  # of its local store, which mlflow-skinny leaves out


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ResourceError` where the package of a tracker is missing, with what installs it."""
    if missing := _missing(names):
        raise ResourceError(
            f"track=[{', '.join(names)}] needs {' and '.join(missing)}: pip install "
            "'deepclust[track]', or leave it out of `track`"
        )


def _missing(names: Sequence[str]) -> list[str]:
    needed = [NEEDS[name] for name in names]
    needed += MLFLOW_STORE if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ else ()
    return [package for package in needed if importlib.util.find_spec(package) is None]


@contextlib.contextmanager
def tracked(run: Run, warn: Callable[[str], None]) -> Iterator[None]:
    """Feed the trackers of a run while the block lasts; `warn` hears of one that fails.

    It ends no run. Where a package is missing nothing is fed: see `require_trackers`.
    """
    names = run.recipe.track
    follower = _start(run, warn) if names and not _missing(names) else None
    finished = False
    try:
        yield
        finished = True
    finally:
        if follower is not None:
            follower.end(PATIENCE_S[finished])


def send_rest(run: Run, warn: Callable[[str], None]) -> None:
    """Send trackers what they have missed of a run that has finished."""
    names = run.recipe.track
    if not any(_is_behind(run, name) for name in names):
        return
    require_trackers(names)
    follower = _start(run, warn)
    if follower is not None:
        follower.end(REST_S)


def _is_behind(run: Run, name: str) -> bool:
    """Return whether a tracker has not been closed with the last metrics of the run."""
    try:
        offset = read_json(run.path / "tracking.json")[name]["closed"]
        return bool(offset != (run.path / "metrics.jsonl").stat().st_size)
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return True


class _Follower:
    """The process, and the thread that passes on what it says."""

    def __init__(self, run: Run, warn: Callable[[str], None]) -> None:
        file = run.path / "logs" / "tracking.out"
        command = [sys.executable, "-P", "-m", PROGRAM, str(run.path.absolute())]
        quiet = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with disk_errors(file), open_append(file) as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
                start_new_session=True, env={**os.environ, **quiet},
            )  # fmt: skip
        self.warn = warn
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        """Pass on a line for each tracker that fails."""
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.warn(line.rstrip())

    def end(self, patience: float) -> None:
        """Let the process send the rest, and kill it where that takes too long."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it may have died
            self.process.stdin.close()
        try:
            if code := self.process.wait(patience):
                self.warn(f"the trackers ended with exit code {code}: see logs/tracking.out")
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.warn(
                f"the trackers were behind after {patience:g} s, and were ended. `deepclust "
                "resume` sends them the rest"
            )
        self._listening.join(1.0)


def _start(run: Run, warn: Callable[[str], None]) -> _Follower | None:
    """Start the process; where that fails the run goes on without it."""
    try:
        return _Follower(run, warn)
    except Exception as error:
        warn(f"nothing is tracked: {error}")
        return None
