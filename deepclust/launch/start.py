"""Starting and resuming a run on this machine: in this process, or as a worker group.

Nothing here imports torch before the run directory stands and its lock is held. One rank that
clusters inline works in this process. Otherwise every rank and the cluster worker is a process,
and this one is their supervisor.
"""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepclust import errors
from deepclust.data.read import worker_processes
from deepclust.data.shards.url import is_url
from deepclust.errors import DataError, RecipeError, RequeueWanted, shown
from deepclust.files import check_utf8, disk_errors, file_hash, path_of, read_record
from deepclust.launch import torchrun
from deepclust.launch.endings import Ending
from deepclust.launch.local import Pipes
from deepclust.launch.policy import Policy
from deepclust.launch.role import cores, roles_of
from deepclust.launch.signals import collected_signals
from deepclust.launch.supervisor import Show, Supervisor, attempts_of
from deepclust.launch.torchrun import Place
from deepclust.launch.tracking import send_rest
from deepclust.launch.visible_gpus import gpus_here
from deepclust.launch.warm import Warm, warmed
from deepclust.optim.schedule import learning_rate
from deepclust.recipe import HUBS, PATHS, Recipe, differences
from deepclust.recipe.may_change import MAY_CHANGE, may_change
from deepclust.recipe.sections import BESIDE, PLACES, SHARDS, Section
from deepclust.run import decoder, directory, lock
from deepclust.run.directory import Run
from deepclust.run.lock import hold

NO_PATHS = (
    *("pipe:", "file:", "local:"),  # refused by the reader of shards, which shows them as given
    *HUBS,
)


def pretrain(recipe: Recipe | str | Path, run: str | Path, show: Show | None = None) -> Run:
    """Pretrain by a recipe into a new run directory, in the foreground, and return the run.

    `recipe` may be a path or the name of a shipped one, as on the command line. Raises the errors
    of `deepclust.errors`. Whatever was finished before stays and `resume` continues from it.
    """
    path = path_of(run, "run")
    given = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    place = torchrun.place()
    if place is None:
        prepare_run(with_clustering_ranks(given), path)
        return _start(path, show)
    if place.rank > 0:
        return place.follow(path)
    with place.leading():
        if not (place.is_restart and directory.exists(path)):
            prepare_run(_of_place(given, place), path)
        return _start(path, show, place=place)


def prepare_run(recipe: Recipe, path: Path) -> None:
    """Make the run directory, with what this machine decides written into the recipe."""
    check_utf8(path, "a run")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with hold(path):
        directory.create(path, resolved(recipe))


def resume(
    run: str | Path, *overrides: str, show: Show | None = None, accept_decoder: bool = False
) -> Run:
    """Continue a run from what is on disk.

    A finished one is left as it is. `accept_decoder`: GPUs may decode images otherwise than before.

    What changes no result may change (`recipe.may_change`), and `train.epochs` may grow. Any other
    difference raises `RunDiffersError`.
    """
    place = torchrun.place()
    if accept_decoder and (place is None or place.rank == 0):
        accept_other_decoder(run)
    if place is None:
        return _start(_changed_run(run, *overrides, show=show), show)
    if place.rank > 0:
        return place.follow(path_of(run, "run"))
    with place.leading():
        place.fitted(directory.open_run(run).recipe.replace("train.ranks=1", *overrides))
        path = _changed_run(run, *overrides, f"train.ranks={place.size}", show=show)
        return _start(path, show, place=place)


def accept_other_decoder(run: str | Path) -> None:
    """Let the next attempt of a run decode images by the GPUs that are there then, once.

    Raises `RecipeError` for a run whose CPUs decode, and `RunHeldError` for one that goes on.
    """
    path = directory.open_run(run).path
    with hold(path) as token:
        decoder.accept(Run(path, token))


def _of_place(recipe: Recipe, place: Place) -> Recipe:
    """Return the recipe for the ranks of torchrun, which share this machine's CPUs."""
    recipe, share = place.fitted(recipe), max(1, cores() // place.local_size)
    recipe = with_readers(recipe, share)
    threads = recipe.train.threads or max(1, share - recipe.data.readers())
    return with_clustering_ranks(recipe.replace(f"train.threads={threads}"), workers=False)


def _changed_run(run: str | Path, *overrides: str, show: Show | None) -> Path:
    """Write the changes of a run that is resumed, and return its directory."""
    before = directory.open_run(run)
    check_utf8(before.path, "a run")
    recipe = with_readers(changed(before, *overrides))
    with lock.unheld(before.path):
        make_room(before, recipe)  # a full disk could not even take the lock
    with hold(before.path) as token:
        if recipe != before.recipe:
            check_data(before, recipe)
            recipe.save(before.path / "recipe.yaml")
            if text := jump_of_rate(before, recipe):
                _tell(replace(before, token=token), text, show)
    return before.path


def changed(run: Run, *overrides: str) -> Recipe:
    """Return the recipe of a run with changes, its paths absolute.

    Raises `RunDiffersError` for a change that a resumed run may not have.
    """
    recipe = with_absolute_paths(run.recipe.replace(*overrides)) if overrides else run.recipe
    check_changes(run, recipe)
    return recipe


def make_room(run: Run, recipe: Recipe) -> None:
    """Delete at once what smaller `keep.*` no longer keeps: the disk may be full."""
    keep, before = recipe.keep, run.recipe.keep
    if keep.checkpoints < before.checkpoints:
        directory.prune(run.checkpoints(), keep.checkpoints)
    if keep.features < before.features:
        # those of the newest round may be what it is clustered from
        features = [run.round(number) / "features" for number in run.rounds()]
        directory.prune(features, keep.features)


def check_data(run: Run, recipe: Recipe) -> None:
    """Raise `RunDiffersError` when changed places of data hold other data than the run began with.

    Nothing is stored then. A run that has not begun takes any.
    """
    places = ("data.shards", "data.index")
    moved = [key for key in differences(run.recipe, recipe) if key.startswith(places)]
    file = run.path / "data.json"
    if not moved or not file.exists():
        return
    from deepclust.stages.data_index import open_data_index  # slow

    began = read_record(file, {"fingerprint": str})["fingerprint"]
    index = open_data_index(recipe.data, run.path)
    if index.fingerprint != began:
        raise errors.RunDiffersError(
            f"{', '.join(moved)}: these are not the data that {run.path} began with (fingerprint "
            f"{index.fingerprint}, not {began}). Give the folder that the old shards were moved to."
        )


def jump_of_rate(run: Run, recipe: Recipe) -> str:
    """Return how the rate jumps where a run is made longer, or "" where it does not."""
    old, new = run.recipe.train, recipe.train
    steps = run.metrics("train")
    done = float(steps[-1].get("epoch") or 0.0) if steps else 0.0
    before, after = learning_rate(old, done), learning_rate(new, done)
    if new.epochs == old.epochs or math.isclose(before, after, rel_tol=1e-3):
        return ""
    return (
        f"with {new.epochs} epochs instead of {old.epochs} the {new.schedule} schedule is another "
        f"one: at epoch {done:.3g} the learning rate goes from {before:.3g} to {after:.3g}"
    )


def _tell(run: Run, text: str, show: Show | None) -> None:
    run = replace(run, attempt=attempts_of(run))
    run.event("warning", text=text)
    if show is not None:
        show({"event": "warning", "text": text})


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


def is_finished(run: Run, events: list[dict[str, Any]] | None = None) -> bool:
    """Return whether the run has been trained to the end of its recipe, by its `events`."""
    known = run.events() if events is None else events
    finished = [e for e in known if e["event"] == "finished"]
    return bool(finished) and finished[-1]["epochs"] >= run.epochs


def look_over(run: Run, show: Show) -> None:
    """Show a warning for each file of a finished run that is not as it was written.

    Its exported weights are written again from the last checkpoint.
    """
    for folder in [run.round(r) / s for r in run.rounds() for s in ("assignments", "centroids")]:
        try:
            directory.verify(folder)
        except DataError as error:
            show(
                {
                    "event": "warning",
                    "text": f"{error}. The run is finished, so it is not made again",
                }
            )
    hashes = [e["hash"] for e in run.events() if e["event"] == "exported" and "hash" in e]
    file = run.path / "export" / "backbone.safetensors"
    if not hashes or (file.is_file() and file_hash(file) == hashes[-1]):
        return
    from deepclust.trained.again import export_again  # imports torch

    written = export_again(run, file)
    run.event("exported", file=str(file), hash=written.hash)
    text = f"{file} was missing or had changed: it is written again from the last checkpoint"
    show({"event": "warning", "text": text})


def resolved(recipe: Recipe) -> Recipe:
    """Write down what this machine decides, so that the run can be resumed from anywhere.

    Paths become absolute. Results on a CPU depend on the threads per rank: its share of the cores,
    less those that its reader processes keep busy. With overlap the cluster worker has a share too.
    """
    recipe, share = with_readers(recipe), _share(recipe)
    threads = recipe.train.threads or max(1, share - recipe.data.readers())
    train = recipe.train.model_copy(update={"threads": threads})
    return with_absolute_paths(recipe.model_copy(update={"train": train}))


def with_clustering_ranks(recipe: Recipe, workers: bool = True) -> Recipe:
    """Return a new run's recipe with `cluster.where=ranks` where no GPU is left for a worker.

    A worker would share the first rank's GPU, and the others would wait for it. `workers`: whether
    there can be one at all. On CPUs, and where the recipe says what clusters, nothing changes.
    """
    config, train = recipe.cluster, recipe.train
    if config is None or config.where != "auto" or config.overlap or train.ranks == 1:
        return recipe
    if train.device == "cpu" or config.gpus == 0 or config.device not in ("auto", "cuda"):
        return recipe
    gpus = gpus_here()
    if gpus == 0 or (workers and train.ranks < gpus):
        return recipe
    return recipe.replace("cluster.where=ranks")


def with_readers(recipe: Recipe, cpus: int | None = None) -> Recipe:
    """Return the recipe with a number for `data.workers=auto`, for a rank of so many CPUs.

    By default these are a rank's share of this machine.
    """
    count = recipe.data.readers(_share(recipe) if cpus is None else cpus)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": count})})


def _share(recipe: Recipe) -> int:
    """Return the CPUs of a process of the worker group on this machine."""
    beside = recipe.cluster is not None and recipe.cluster.overlap
    return cores() // (recipe.train.ranks + beside)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with every path in it absolute, so that it means the same anywhere."""
    sections: dict[str, Section] = {}
    for key in sorted(PATHS):
        top, _, name = key.partition(".")
        section = sections.get(top, getattr(recipe, top))
        if section is not None:
            path = _absolute(getattr(section, name), is_word=top == "seeds")
            sections[top] = section.model_copy(update={name: path})
    if os.path.isfile(recipe.data.labels):  # of class names, for image files
        names = {"labels": os.path.abspath(recipe.data.labels)}
        sections["data"] = sections["data"].model_copy(update=names)
    return recipe.model_copy(update=sections)


def _absolute(value: Any, is_word: bool = False) -> Any:
    """Return a path as an absolute one, in lists and as keys of dictionaries too.

    URLs and null stay. `is_word`: "shards" says where labels are.
    """
    if isinstance(value, dict):
        return {_absolute(key): weight for key, weight in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_absolute(one) for one in value)
    if not isinstance(value, str) or is_url(value) or (is_word and value == SHARDS):
        return value
    return value if value.startswith(NO_PATHS) else os.path.abspath(value)


def check_changes(run: Run, recipe: Recipe) -> None:
    """Raise `RunDiffersError` for a change that a resumed run may not have."""
    longer = recipe.train.epochs > run.recipe.train.epochs
    refused = {
        key: values
        for key, values in differences(run.recipe, recipe).items()
        if not may_change(key, longer=longer)
    }
    weights = run.recipe.data.weights, recipe.data.weights
    if recipe.cluster is None and weights[0] != weights[1]:
        refused["data.shards, weights"] = weights
    if refused:
        pairs = {key: shown(list(values), key) for key, values in refused.items()}
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in pairs.items())
        free = ", ".join([*MAY_CHANGE, *(f"{name}.*" for name in (*PLACES, *BESIDE))])
        raise errors.RunDiffersError(
            f"resume may change {free} and a larger train.epochs, but not\n{lines}\n"
            "Start a new run instead; init.weights and init.assignments carry over what you want."
        )


def _start(
    run_dir: Path, show: Show | None, stage: str | None = None, place: Place | None = None
) -> Run:
    with hold(run_dir) as token, collected_signals() as signals:
        run = Run(run_dir, token)
        if is_finished(run):
            tell = show or (lambda record: None)
            look_over(run, tell)
            send_rest(run, lambda text: tell({"event": "warning", "text": text}))
            return run
        policy = Policy.of(run.recipe)
        supervisor = Supervisor(run, policy, lambda: bool(signals), show or (lambda record: None))
        with supervisor.recorded(stage):
            try:
                with warmed(place is None and len(roles_of(run.recipe)) > 1) as warm:
                    supervisor.control(lambda: _attempt(supervisor, stage, place, warm))
            except RequeueWanted:
                if signal.SIGINT in signals:
                    raise KeyboardInterrupt from None
                raise
        return supervisor.run


def _attempt(
    supervisor: Supervisor, stage: str | None, place: Place | None, warm: Warm | None
) -> Ending:
    """Make one attempt, in this process where a single rank clusters inline, or of torchrun's."""
    recipe = supervisor.run.recipe
    supervisor.begin(recipe.train.ranks)
    roles = roles_of(recipe, stage) if place is None else [place.role]
    if place is not None:
        place.announce(supervisor.run)
    if len(roles) > 1:
        return supervisor.watch(Pipes(supervisor.run, warm), roles)
    if recipe.data.readers():
        worker_processes.start_fork_server()  # which imports torch while we do
    from deepclust.launch.in_process import borrowed_process  # imports torch
    from deepclust.launch.worker import work
    from deepclust.run.reporting import DirectReport

    report = DirectReport(supervisor.run, supervisor.tell)
    with borrowed_process():
        work(supervisor.run, roles[0], report, supervisor.asked)
    return Ending("finished")
