"""Starting and resuming a run on this machine: in this process, or as a worker group.

Nothing here imports torch before the run directory stands and its lock is held. One rank that
clusters inline works in this process. Otherwise every rank and the cluster worker is a process,
and this one is their supervisor.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from deepclust import errors
from deepclust.errors import RecipeError, RequeueWanted
from deepclust.files import disk_errors
from deepclust.launch.endings import Ending
from deepclust.launch.local import Pipes
from deepclust.launch.policy import Policy
from deepclust.launch.role import roles_of
from deepclust.launch.signals import collected_signals
from deepclust.launch.supervisor import Show, Supervisor
from deepclust.recipe import Recipe, differences
from deepclust.recipe.sections import PLACES, SHARDS, Section
from deepclust.redaction import shown
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold

MAY_CHANGE = (
    "train.ranks", "train.hang", "train.restarts", "data.workers", "data.stage", "data.scratch"
)  # fmt: skip


def pretrain(recipe: Recipe, run: str | Path, show: Show | None = None) -> Run:
    """Pretrain by a recipe into a new run directory, in the foreground, and return the run.

    Raises the errors of `deepclust.errors`. Whatever was finished before stays and `resume`
    continues from it.
    """
    path = Path(run)
    prepare_run(recipe, path)
    return _start(path, show)


def prepare_run(recipe: Recipe, path: Path) -> None:
    """Make the run directory, with what this machine decides written into the recipe."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with hold(path):
        directory.create(path, resolved(recipe))


def resume(run: str | Path, *overrides: str, show: Show | None = None) -> Run:
    """Continue a run from what is on disk.

    A finished one is left as it is.

    Ranks and workers may change, and `train.epochs` may grow. Any other difference raises
    `RunDiffersError`.
    """
    before = directory.open_run(run)
    recipe = before.recipe.replace(*overrides)
    check_changes(before, recipe)
    with hold(before.path):
        if recipe != before.recipe:
            recipe.save(before.path / "recipe.yaml")
    return _start(before.path, show)


def run_stage(run: str | Path, stage: str, show: Show | None = None) -> Run:
    """Do one stage (extract, cluster or train) of a run, then stop.

    `resume` does the rest.

    Raises `RecipeError` for a run with `cluster.overlap`, where no stage is alone.
    """
    run_dir = directory.open_run(run).path
    cluster = Run(run_dir).recipe.cluster
    if cluster is None:
        raise RecipeError(f"{run_dir} has no clustering, so it has no stages to run alone")
    if cluster.overlap:
        raise RecipeError(
            f"{run_dir} trains while it clusters (cluster.overlap), so its stages cannot be run "
            f"one at a time: deepclust resume {run_dir}"
        )
    return _start(run_dir, show, stage)


def is_finished(run: Run) -> bool:
    """Return whether the run has been trained to the end of its recipe."""
    finished = [e for e in run.events() if e["event"] == "finished"]
    return bool(finished) and finished[-1]["epochs"] >= run.epochs


def resolved(recipe: Recipe) -> Recipe:
    """Write down what this machine decides, so that the run can be resumed from anywhere.

    Paths become absolute. Results on a CPU depend on the threads per rank: its share of the cores,
    less those that its reader processes keep busy. With overlap the cluster worker has a share too.
    """
    beside = recipe.cluster is not None and recipe.cluster.overlap
    share = _cores() // (recipe.train.ranks + beside)
    threads = recipe.train.threads or max(1, share - recipe.data.workers)
    data, init, seeds = recipe.data, recipe.init, recipe.seeds
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"threads": threads}),
            "data": data.model_copy(update=_absolute(data, "shards", "index", "scratch", "stage")),
            "init": init.model_copy(update=_absolute(init, "weights", "assignments")),
            "seeds": seeds and seeds.model_copy(update=_absolute(seeds, "labels", "held_out")),
        }
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux knows what a scheduler gave us
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _absolute(section: Section, *names: str) -> dict[str, str]:
    values = {name: getattr(section, name) for name in names}
    paths = {n: v for n, v in values.items() if v is not None and ":" not in v and v != SHARDS}
    return {name: os.path.abspath(value) for name, value in paths.items()}


def check_changes(run: Run, recipe: Recipe) -> None:
    """Raise `RunDiffersError` for a change that a resumed run may not have."""
    changed = differences(run.recipe, recipe)
    longer = recipe.train.epochs > run.recipe.train.epochs
    allowed = (*MAY_CHANGE, "train.epochs") if longer else MAY_CHANGE
    refused = {
        key: values
        for key, values in changed.items()
        if key not in allowed and key.partition(".")[0] not in PLACES
    }
    if refused:
        pairs = {key: shown(list(values), key) for key, values in refused.items()}
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in pairs.items())
        raise errors.RunDiffersError(
            f"resume may change {', '.join([*MAY_CHANGE, *(f'{name}.*' for name in PLACES)])} and "
            f"a larger train.epochs, but not\n{lines}\n"
            "Start a new run instead; init.weights and init.assignments carry over what you want."
        )


def _start(run_dir: Path, show: Show | None, stage: str | None = None) -> Run:
    with hold(run_dir) as token, collected_signals() as signals:
        run = Run(run_dir, token)
        if is_finished(run):
            return run
        policy = Policy.of(run.recipe)
        supervisor = Supervisor(run, policy, lambda: bool(signals), show or (lambda record: None))
        with supervisor.recorded(stage):
            try:
                supervisor.control(lambda: _attempt(supervisor, stage))
            except RequeueWanted:
                if signal.SIGINT in signals:
                    raise KeyboardInterrupt from None
                raise
        return supervisor.run


def _attempt(supervisor: Supervisor, stage: str | None) -> Ending:
    """Make one attempt, in this process where a single rank clusters inline."""
    recipe = supervisor.run.recipe
    supervisor.begin(recipe.train.ranks)
    roles = roles_of(recipe, stage)
    if len(roles) > 1:
        return supervisor.watch(Pipes(supervisor.run), roles)
    from deepclust.launch.in_process import borrowed_process  # imports torch
    from deepclust.launch.worker import work
    from deepclust.run.reporting import DirectReport

    report = DirectReport(supervisor.run, supervisor.show)
    with borrowed_process():
        work(supervisor.run, roles[0], report, supervisor.asked)
    return Ending("finished")
