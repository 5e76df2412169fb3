"""What people do with runs: submit, resume, cancel and follow them.

The verbs of the CLI are thin over these functions, which print nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster_jobs import job_file
from cluster_jobs.data_places import remember_places, require_known_places
from cluster_jobs.executors import executor, executor_of, require_packages
from cluster_jobs.executors.base import Plan, Sweep
from cluster_jobs.status import Status, find_runs
from cluster_jobs.status import follow as follow_log
from cluster_jobs.sweep import run_dirs
from deepclust.errors import DeepclustError, RecipeError, ResourceError, RunHeldError
from deepclust.launch import start
from deepclust.recipe import Recipe
from deepclust.run import directory, lock
from deepclust.run.directory import Run

Show = Callable[[dict[str, Any]], None]


def pretrain(source: str, run_dir: Path, overrides: Sequence[str], show: Show) -> Run:
    """Pretrain by a recipe in this process, and return the finished run."""
    recipe = Recipe.load(source, *overrides)
    refuse_queued(run_dir)
    job_file.record_local(run_dir)
    remember_places(recipe)
    return start.pretrain(recipe, run_dir, show)


def submit(
    source: str, run_dir: Path, on: str, overrides: Sequence[str], dry_run: bool = False
) -> Plan:
    """Start or queue a run by a recipe, and return its plan.

    A dry run only makes the plan.
    """
    plan = planned(source, run_dir, on, overrides)
    if not dry_run:
        refuse_queued(run_dir)
        remember_places(plan.recipe)
        executor(on).submit(plan)
    return plan


def planned(source: str, run_dir: Path, on: str, overrides: Sequence[str]) -> Plan:
    """Return the plan of a run by a recipe, without writing or starting anything."""
    require_packages(on)
    plan: Plan = executor(on).prepare(Recipe.load(source, *overrides), run_dir)
    return plan


def submit_sweep(
    source: str,
    folder: Path,
    on: str,
    overrides: Sequence[str],
    sweep: list[str],
    dry_run: bool = False,
) -> Sweep[Any]:
    """Submit a run for every point of a sweep, into one folder, and return their plans."""
    require_packages(on)
    where = executor(on)
    plans = [
        where.prepare(Recipe.load(source, *overrides, *point), run_dir)
        for run_dir, point in run_dirs(folder, sweep).items()
    ]
    planned = where.prepare_sweep(plans, folder)
    if dry_run:
        return planned
    if directory.exists(folder):
        raise RecipeError(f"{folder} is a run, not a folder for runs: choose another --run")
    for plan in plans:
        refuse_queued(plan.run_dir)
        remember_places(plan.recipe)
    where.submit_sweep(planned)
    return planned


def resume(
    run_dir: Path, overrides: Sequence[str], on: str, remote: bool = False,
    accept_decoder: bool = False,
) -> None:  # fmt: skip
    """Continue a run in the background of an executor (`remote`: see `data_places`).

    `accept_decoder`: its GPUs may decode images otherwise than before.
    """
    refuse_queued(run_dir)
    require_known_places(directory.open_run(run_dir), overrides, remote)
    require_packages(on)
    if accept_decoder:
        start.accept_other_decoder(run_dir)
    executor(on).resume(run_dir, list(overrides))


def resume_here(
    run_dir: Path, overrides: Sequence[str], show: Show, remote: bool = False,
    accept_decoder: bool = False,
) -> Run:  # fmt: skip
    """Continue a run in this process, and return the finished run; options as in `resume`."""
    refuse_queued(run_dir)
    require_known_places(directory.open_run(run_dir), overrides, remote)
    job_file.record_local(run_dir)
    return start.resume(run_dir, *overrides, show=show, accept_decoder=accept_decoder)


def run_stage(run_dir: Path, stage: str, show: Show) -> Run:
    """Do one stage of a run in this process: extract, cluster or train."""
    refuse_queued(run_dir)
    require_known_places(directory.open_run(run_dir), (), remote=False)
    job_file.record_local(run_dir)
    return start.run_stage(run_dir, stage, show=show)


def cancel(folder: Path) -> Iterator[str]:
    """Stop a run, or all runs in a folder, and yield what became of each."""
    if directory.exists(folder):
        yield executor_of(folder).cancel(folder)
        return
    for run in find_runs(folder) or [directory.open_run(folder)]:
        try:
            yield executor_of(run.path).cancel(run.path)
        except DeepclustError as error:  # one broken run must not keep the others going
            yield f"{run.path} was not stopped: {error}"


def follow(run_dir: Path, emit: Callable[[str], None]) -> Status:
    """Emit the log of a run until the run has ended, and return how it ended.

    Raises `ResourceError` when its controller does not come any more.
    """
    return follow_log(run_dir, emit)


def refuse_queued(run_dir: Path) -> None:
    """Raise `RunHeldError` when a job of the run is queued or coming up.

    Where a cluster does not answer, the run's lock alone decides.
    """
    with contextlib.suppress(ResourceError):
        # the lock names its holder, so it is left to those who acquire it
        if not directory.exists(run_dir) or lock.owner(run_dir):
            return
        if executor_of(run_dir).is_pending(run_dir):
            raise RunHeldError(f"{run_dir} has a job already: deepclust cancel {run_dir} ends it")
