"""The table of executors, the places where a run runs: each file has a name `EXECUTOR`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

from cluster_jobs import job_file
from cluster_jobs.executors.base import Executor
from deepclust.errors import RecipeError, ResourceError
from deepclust.files import import_named

EXECUTORS = {
    "local": "cluster_jobs.executors.local",
    "ray": "cluster_jobs.executors.ray",
    "slurm": "cluster_jobs.executors.slurm",
}
NEEDS = {"ray": ("ray",), "slurm": ("submitit", "ray")}  # packages of the extra of that name


def require_packages(name: str) -> None:
    """Raise `ResourceError` where packages of an executor are missing, with what installs them.

    Runs can be listed, and their files read, without them.
    """
    missing = [one for one in NEEDS.get(name, ()) if importlib.util.find_spec(one) is None]
    if missing:
        raise ResourceError(
            f"--on {name} needs {' and '.join(missing)}: pip install 'deepclust[{name}]'"
        )


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
