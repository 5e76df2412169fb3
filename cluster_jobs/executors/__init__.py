"""Where a run runs: one file an executor, each with prepare, submit, resume and cancel."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import ModuleType

from cluster_jobs import job_file
from deepclust.errors import RecipeError, ResourceError, RunHeldError
from deepclust.run import directory, lock

EXECUTORS = ("local", "ray", "slurm")


def executor(name: str) -> ModuleType:
    """The executor of a name, or an error that lists those there are."""
    if name not in EXECUTORS:
        raise RecipeError(f"--on {name!r}: choose from {', '.join(EXECUTORS)}")
    return importlib.import_module(f"cluster_jobs.executors.{name}")  # ray is imported when asked


def refuse_queued(run: Path) -> None:
    """Raise `RunHeldError` when a job of the run waits or is coming up somewhere.

    Nobody is asked who does not answer: then the lock alone decides.
    """
    with contextlib.suppress(ResourceError):
        if not directory.exists(run) or lock.owner(run) or not executor_of(run).is_pending(run):
            return  # who is held says so with the holder's name
        raise RunHeldError(f"{run} has a job already: deepclust cancel {run} ends it")


def executor_of(run: Path) -> ModuleType:
    """The executor that a run was submitted to."""
    return executor(job_file.read(run)["on"])
