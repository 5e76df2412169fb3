"""The local executor: a run in the background of this machine, free of the shell that began it.

The background process is `deepclust resume RUN` in a session of its own; it is its own
controller, holds the run's lock, and is found again by that lock.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from deepclust import lock, rundir
from deepclust.errors import ResourceError, RunHeldError
from deepclust.launch import check_changes, prepare_run
from deepclust.recipe import Recipe

CANCEL_PATIENCE_S = 60.0
START_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Plan:
    """What would be started; printing it is a dry run."""

    recipe: Recipe
    run: Path
    command: list[str]

    def __str__(self) -> str:
        command = shlex.join(self.command)
        return f"# in the background of this machine:\n{command}\n\n{self.recipe.dump()}"


def prepare(recipe: Recipe, run: Path) -> Plan:
    """The command for a recipe; nothing is written or started."""
    command = [sys.executable, "-P", "-m", "cluster_jobs.cli", "resume", str(run.absolute())]
    return Plan(recipe, run, command)


def submit(plan: Plan) -> None:
    """Create the run and start its controller."""
    prepare_run(plan.recipe, plan.run)
    _start(plan.run, plan.command)


def resume(run: Path, overrides: list[str]) -> None:
    """Start a controller for a run that exists; refuses what a foreground resume refuses."""
    found = rundir.open_run(run)
    check_changes(found, found.recipe.replace(*overrides))
    owner = lock.owner(run)
    if owner:
        raise RunHeldError(f"{run} is held by {owner}; end it with `deepclust cancel {run}`")
    _start(run, [*prepare(found.recipe, run).command, *overrides])


def _start(run: Path, command: list[str]) -> None:
    """Start a controller and wait until it holds the run, so that status and logs find it."""
    file = run / "logs" / "controller.log"
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
        raise ResourceError(f"{run} ended with exit code {process.returncode}; see {file}")


def cancel(run: Path) -> str:
    """Ask the controller to stop at the next step; kill it when it does not."""
    rundir.open_run(run)
    pid = lock.owner_pid(run)
    if pid is None:
        owner = lock.owner(run)
        if owner:
            raise ResourceError(f"{run} is held by {owner}: cancel it there")
        return f"{run} is not running"
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + CANCEL_PATIENCE_S
    while lock.owner_pid(run) == pid:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return f"{run} did not stop in {CANCEL_PATIENCE_S:.0f} s and was killed"
        time.sleep(0.1)
    return f"{run} was stopped; deepclust resume {run} continues it"
