"""The local executor: a run in the background of this machine, free of the shell that began it.

The background process is `deepclust resume RUN`. It is its own controller.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster_jobs import job_file
from cluster_jobs.data_places import places_of
from cluster_jobs.executors import background
from cluster_jobs.executors.base import Executor, JobState, open_to_resume
from deepclust.errors import ResourceError
from deepclust.launch.start import prepare_run, with_clustering_ranks, with_readers
from deepclust.recipe import Recipe
from deepclust.run import lock


@dataclass(frozen=True)
class Plan:
    """What would be started, with the dry run as its text."""

    recipe: Recipe
    run_dir: Path
    command: list[str]

    def __str__(self) -> str:
        command = shlex.join(self.command)
        return f"# in the background of this machine:\n{command}\n\n{self.recipe.show()}"


class LocalExecutor(Executor[Plan]):
    """Runs in the background of this machine."""

    name = "local"

    def prepare(self, recipe: Recipe, run_dir: Path) -> Plan:
        """Return the command for a recipe, without writing or starting anything."""
        command = [sys.executable, "-P", "-m", "cluster_jobs.cli", "resume"]
        remote = ["--remote"] * bool(places_of(recipe))  # the user has been asked already
        return Plan(with_readers(recipe), run_dir, [*command, str(run_dir.absolute()), *remote])

    def submit(self, plan: Plan) -> None:
        """Create the run and start its controller."""
        prepare_run(with_clustering_ranks(plan.recipe), plan.run_dir)
        background.start(plan.run_dir, plan.command)

    def resume(self, run_dir: Path, overrides: list[str]) -> None:
        """Start a controller for a run that exists, and refuse what a foreground resume refuses."""
        run, recipe = open_to_resume(run_dir, overrides)
        if recipe != run.recipe:  # by the recipe: everybody can see the arguments of a process
            with lock.hold(run_dir):
                recipe.save(run_dir / "recipe.yaml")
        job_file.record(run_dir, **job_file.LOCAL)
        background.start(run_dir, self.prepare(recipe, run_dir).command)

    def cancel(self, run_dir: Path) -> str:
        """Ask the controller to stop at its next step, and kill it when it does not."""
        pid = lock.owner_pid(run_dir)
        if pid is not None:
            return background.stop(run_dir, pid)
        if owner := lock.owner(run_dir):
            raise ResourceError(f"{run_dir} is held by {owner}: cancel it there")
        return f"{run_dir} is not running"

    def state(self, run_dir: Path) -> JobState | None:
        """Return None: there is no queue, and `submit` returns when the controller has the run."""
        return None


EXECUTOR = LocalExecutor()
