"""Where a run runs: one file an executor, each with prepare, submit, resume and cancel."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from cluster_jobs import job
from deepclust.errors import RecipeError

EXECUTORS = ("local", "ray", "slurm")


def executor(name: str) -> ModuleType:
    """The executor of a name, or an error that lists those there are."""
    if name not in EXECUTORS:
        raise RecipeError(f"--on {name!r}: choose from {', '.join(EXECUTORS)}")
    return importlib.import_module(f"cluster_jobs.executors.{name}")  # ray is imported when asked


def executor_of(run: Path) -> ModuleType:
    """The executor that a run was submitted to."""
    return executor(job.read(run)["on"])
