"""Evaluation of a run's frozen network on labelled shards.

What needs a run directory is here: the newest checkpoint, the recipe, the labelled seeds. The
evaluators in `deepclust.evaluate` see a `Frozen`, and know no run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster_jobs.results.baselines import Beside, baselines
from cluster_jobs.results.layers import check_layers, layer_scores
from cluster_jobs.results.shards import open_shards
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DeepclustError, redact
from deepclust.evaluate import Scores, evaluate, find_evaluator
from deepclust.evaluate.frozen import (
    DIM,
    Answers,
    Embed,
    Frozen,
    Images,
    Labelled,
    SeedRows,
    class_names,
    embed_labelled,
    folder_of,
    freeze_shards,
)
from deepclust.files import read_record, write_json
from deepclust.launch.start import is_finished
from deepclust.methods.embed import Embedder
from deepclust.models import Backbone
from deepclust.recipe.sections import Data
from deepclust.run import labels
from deepclust.run.best import load_best
from deepclust.run.checkpoint import Checkpoint
from deepclust.run.directory import Run, open_run
from deepclust.run.links import refuse_links_out
from deepclust.seeds.table import load as load_seeds
from deepclust.trained.answers import columns_of
from deepclust.trained.class_means import answering, is_of
from deepclust.trained.nearest_mean import NearestMean
from deepclust.trained.saved import embedder_of, fresh_embedder, newest

log = logging.getLogger("deepclust")
BASELINES = Beside()
Emit = Callable[[str], None]
MEANS = "the classifier is the nearest class mean of the labelled images (class_means/)"


def evaluate_run(
    run_dir: Path,
    train: str,
    test: str,
    names: Iterable[str] | None = None,
    emit: Callable[[str], None] = log.warning,
    show: Callable[[Scores], None] = lambda scores: None,
    beside: Beside = BASELINES,
    best: bool = False,
) -> Scores:
    """Evaluate a run's newest network on labelled shards and return the scores by evaluator.

    With `best` it is the network of the best checkpoint (`train.evaluate`).

    `show` is given them before they go into `evaluations/STEP.json`, beside those of other
    evaluators on the same shards. `names` are evaluators (default: all). `emit` is given the reason
    for each that is left out, and what is odd about the checkpoint or the labels. It is also given
    the reason why the scores could not be recorded. `beside` says what else.
    """
    names = None if names is None else list(names)
    for name in names or ():
        find_evaluator(name)  # an unknown one is an error before the images are read
    run = open_run(run_dir)
    checkpoint = chosen_checkpoint(run, emit, best)
    if beside.layers:
        check_layers(embedder_of(run, checkpoint))
    labels = beside.labels
    with open_shards(train, run, labels) as index, open_shards(test, run, labels) as test_index:
        frozen = _freeze(run, checkpoint, (index, test_index), emit, labels is None)
        frozen = replace(frozen, finetuning=beside.finetuning)
        for note in frozen.notes:
            emit(f"note: {note}")
        scores = evaluate(frozen, names, emit)
        indexes = (index, test_index)
        if beside.layers:
            scores["layers"] = layer_scores(frozen, indexes, embedder_of(run, checkpoint), emit)
        if beside.baselines:
            scores["baselines"] = _baselines(run, frozen, indexes, names, emit)
    show(scores)
    shards = {"train": redact(train), "test": redact(test)}
    record = {"step": checkpoint.state.step, **shards, "scores": scores}
    file = run.path / "evaluations" / f"{checkpoint.state.step:08d}.json"
    keep_record(run, file, record, emit)
    return scores


def keep_record(run: Run, file: Path, record: dict[str, Any], emit: Callable[[str], None]) -> None:
    """Write the scores into a run, or tell why they cannot be."""
    try:
        refuse_links_out(run.path)
        _write_record(file, record)
    except (DeepclustError, OSError) as error:
        emit(f"warning: the scores are not recorded in the run: {error}")


def _freeze(
    run: Run, checkpoint: Checkpoint, indexes: tuple[Index, Index], emit: Emit, own_labels: bool
) -> Frozen:
    """Return the frozen features of both sets of shards, with the run's seeds where it has any.

    `own_labels`: the labels of these indexes are those that the run would read.
    """
    train, test = indexes
    dim = run.recipe.cluster.dim if run.recipe.cluster else DIM
    embedder = embedder_of(run, checkpoint)
    frozen = freeze_shards(embedder, train, test, run.recipe.data, dim=dim)
    images = Images(embedder.method.trunk, indexes, run.recipe.data)
    frozen = replace(frozen, images=images)
    is_own = own_labels and run.recipe.seeds is not None and is_of(run, train)
    named = answering(run, embedder, checkpoint.state.step, emit, train if is_own else None)
    return _with_seeds(_with_answers(frozen, run, named), run, train)


def _baselines(
    run: Run,
    frozen: Frozen,
    indexes: tuple[Index, Index],
    names: list[str] | None,
    emit: Callable[[str], None],
) -> Scores:
    """Return the scores of baselines, or of none where the images can be read no more."""
    recipe = run.recipe
    facts = recipe.model_dump(mode="json", include={"backbone", "method", "seed"})
    facts["data"] = recipe.data.model_dump(mode="json", include={"size", "resize", "mean", "std"})
    try:
        refuse_links_out(run.path)
        kept = (run.path / "evaluations", {"network": facts})
        classes = labels.class_names(run)
        return baselines(
            frozen, indexes, lambda: fresh_embedder(recipe, classes), names, kept, emit
        )
    except (DeepclustError, OSError) as error:  # what was trained has its scores already
        emit(f"warning: there are no baselines: {error}")
        return {}


def load_embedder(run: Run, emit: Callable[[str], None] = log.warning) -> Embedder:
    """Return the map from images to features of a run's newest readable checkpoint."""
    return embedder_of(run, newest_checkpoint(run, emit))


def load_trunk(run: Run, emit: Callable[[str], None] = log.warning) -> Backbone:
    """Return the backbone that counts of a run's newest readable checkpoint, in eval mode."""
    return load_embedder(run, emit).method.trunk


def labelled_features(embed: Embed, index: Index, data: Data) -> Labelled:
    """Return features and labels of every readable, labelled sample, in sample order."""
    split = embed_labelled(embed, index, data)
    return split.features, split.labels


def chosen_checkpoint(run: Run, emit: Callable[[str], None], best: bool) -> Checkpoint:
    """Return the newest checkpoint, or the best, and tell which step that is."""
    if not best:
        return newest_checkpoint(run, emit)
    checkpoint = load_best(run)
    emit(f"note: these are the weights of step {checkpoint.state.step}, the best by kNN")
    return checkpoint


def newest_checkpoint(run: Run, emit: Callable[[str], None]) -> Checkpoint:
    """Return a run's newest checkpoint that can be read, and tell when it is not the newest saved.

    `emit` is given a text for each newer one that is damaged or missing.
    """
    checkpoint = newest(run, emit)
    step = checkpoint.state.step
    saved = max((e["step"] for e in run.events() if e["event"] == "checkpoint"), default=step)
    if saved > step:
        emit(f"warning: these are the weights of step {step}; the run had saved step {saved} too")
    elif not is_finished(run):
        emit(
            f"note: these are the weights of step {step}, {checkpoint.state.segment} of "
            f"{run.epochs} epochs; the run has not finished"
        )
    return checkpoint


def _with_answers(frozen: Frozen, run: Run, named: Embedder | str) -> Frozen:
    """Return `frozen` with what answers classes, or with the sentence why nothing does."""
    if isinstance(named, str):
        return replace(frozen, answers_missing=named)
    columns = columns_of(run, run.recipe, named.method)
    assert not isinstance(columns, str), columns
    answers = Answers(named.answer, columns.classes, columns.class_of, columns.labels)
    notes = (*frozen.notes, MEANS) if isinstance(named.method, NearestMean) else frozen.notes
    return replace(frozen, answers=answers, notes=notes)


def _with_seeds(frozen: Frozen, run: Run, index: Index) -> Frozen:
    """Return `frozen` with the rows of the run's labelled seeds, or why there are none."""
    if run.recipe.seeds is None:
        return replace(frozen, seeds_missing=f"{run.path} was trained without labelled seeds")
    if not is_of(run, index):
        reason = f"{folder_of(index)} are not the shards that {run.path} was trained on"
        return replace(frozen, seeds_missing=reason)
    table = load_seeds(index, run.recipe.seeds, run.recipe.seed).table
    unknown = [name for name in table.names if name not in class_names(index).values()]
    if unknown:
        reason = (
            f"the seeds' classes {unknown[:5]} are not among those of {folder_of(index)} "
            f"({frozen.classes[:5]}, ...). Name them as its dataset.json does"
        )
        return replace(frozen, seeds_missing=reason)
    numbers = np.array([frozen.classes.index(name) for name in table.names], np.int64)
    rows = np.searchsorted(frozen.train.sample_ids, table.sample_ids)
    readable = np.isin(table.sample_ids, frozen.train.sample_ids)
    labels = numbers[table.classes]
    seeds = SeedRows(rows[readable], labels[readable], run.recipe.seeds.refine)
    return replace(frozen, seeds=seeds)


def _write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the scores, and keep those of other evaluators on the same shards."""
    shards, before = ("train", "test"), None
    fields = {**dict.fromkeys(shards, str), "scores": dict}
    with contextlib.suppress(DataError, FileNotFoundError):  # a damaged record is replaced
        before = read_record(path, fields)
    if before is not None and all(before[split] == record[split] for split in shards):
        record = {**record, "scores": _joined(before["scores"], record["scores"])}
    write_json(path, record)


def _joined(before: Scores, now: Scores) -> Scores:
    """Return the scores of both, where those of now are newer, with the baselines of both."""
    both = {**before, **now}
    old, new = before.get("baselines"), now.get("baselines")
    if isinstance(old, dict) and isinstance(new, dict):
        joined = {name: {**old.get(name, {}), **values} for name, values in new.items()}
        both["baselines"] = {**old, **joined}
    return both
