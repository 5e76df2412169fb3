"""The table of executors, the places where a run runs: each file has a name `EXECUTOR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from cluster_jobs import job_file
from cluster_jobs.executors.base import Executor
from deepclust.errors import RecipeError
from deepclust.files import import_named

EXECUTORS = {
    "local": "cluster_jobs.executors.local",
    "ray": "cluster_jobs.executors.ray",
    "slurm": "cluster_jobs.executors.slurm",
}


def executor(name: str) -> Executor[Any]:
    """Return the executor of a name, or of an importable module if the name has a dot.

    Modules are imported only when they are asked for. Raises `RecipeError` for an unknown name.
    """
    module = EXECUTORS.get(name, name)
    if "." not in module:
        known = ", ".join(EXECUTORS)
        raise RecipeError(
            f"--on {name!r} is not an executor: choose from {known}, or give an importable module "
            "(my.module)"
        )
    loaded = getattr(import_named(module), "EXECUTOR", None)
    if loaded is None:
        raise RecipeError(
            f"--on {name}: the module has no name EXECUTOR that fulfils "
            "cluster_jobs.executors.base.Executor"
        )
    return cast(Executor[Any], loaded)


def executor_of(run_dir: Path) -> Executor[Any]:
    """Return the executor that a run was submitted to."""
    return executor(str(job_file.read(run_dir)["on"]))
