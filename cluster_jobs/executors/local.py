"""The local executor: a run in the background of this machine, free of the shell that began it.

The background process is `deepclust resume RUN`; it is its own controller.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cluster_jobs import job_file
from cluster_jobs.executors import background
from deepclust.errors import RecipeError, ResourceError
from deepclust.launch.start import check_changes, prepare_run
from deepclust.recipe import Recipe
from deepclust.run import directory, lock


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
    background.start(plan.run, plan.command)


def prepare_sweep(plans: list[Plan], folder: Path) -> NoReturn:
    """Refused: all would run at once on this machine."""
    raise RecipeError(
        "a sweep needs a queue: --on slurm, or --on ray with --address; on this machine all would "
        "run at once"
    )


def resume(run: Path, overrides: list[str]) -> None:
    """Start a controller for a run that exists; refuses what a foreground resume refuses."""
    found = directory.open_run(run)
    check_changes(found, found.recipe.replace(*overrides))
    background.refuse_held(run)
    job_file.record(run, **job_file.LOCAL)
    background.start(run, [*prepare(found.recipe, run).command, *overrides])


def cancel(run: Path) -> str:
    """Ask the controller to stop at the next step; kill it when it does not."""
    pid = lock.owner_pid(run)
    if pid is not None:
        return background.stop(run, pid)
    if owner := lock.owner(run):
        raise ResourceError(f"{run} is held by {owner}: cancel it there")
    return f"{run} is not running"


def is_pending(run: Path) -> bool:
    """Never: `submit` returns when the controller has the run."""
    return False
