"""Where a run runs: one file an executor, each with prepare, submit, resume and cancel."""

from __future__ import annotations

from types import ModuleType

from cluster_jobs.executors import local
from deepclust.errors import RecipeError

EXECUTORS = {"local": local}


def executor(name: str) -> ModuleType:
    """The executor of a name, or an error that lists those there are."""
    if name not in EXECUTORS:
        raise RecipeError(f"--on {name!r}: choose from {', '.join(EXECUTORS)}")
    return EXECUTORS[name]
