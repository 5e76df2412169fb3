"""Evaluation of a run without labels, on images of the shards that it was trained on.

    crops        features of two random crops of an image, beside those of other images
    crops_clusters   the share of images whose crops are in one cluster, by the last round
    neighbours   images that are near each other by this checkpoint and by an earlier one
    rounds       images that stayed in their cluster from one round to the next

A run keeps the features of its last rounds only (`keep.features`). So neighbours are compared with
those of an earlier checkpoint that is kept (`keep.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from torch import Tensor

from cluster_jobs.results.evaluate import chosen_checkpoint, keep_record
from cluster_jobs.results.shards import open_own
from deepclust.clustering.statistics import nmi
from deepclust.data.images.crops import CentreCrop, Crop, RandomResizedCrop
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.find import described
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DeepclustError
from deepclust.evaluate import Scores, agreement
from deepclust.evaluate.frozen import Skipped, Value
from deepclust.evaluate.interval import with_interval
from deepclust.launch.role import cores
from deepclust.recipe.sections import Data
from deepclust.run.checkpoint import Checkpoint, load, read_state
from deepclust.run.directory import Run, open_run
from deepclust.run.round_files import read_assignments
from deepclust.trained.labelling import label
from deepclust.trained.saved import embedder_of
from deepclust.trained.trained_run import Labeller, best_labeller_of, labeller_of
from deepclust.world import derive, generator

IMAGES = 2_000  # drawn by the seed
NO_LABELS = "no labels"
Emit = Callable[[str], None]
Scored = Iterator[tuple[str, Value]]


@dataclass(frozen=True)
class _Asked:
    """A run, its weights, and the images that are asked."""

    run: Run
    checkpoint: Checkpoint
    index: Index
    sample_ids: Int64[np.ndarray, " n"]
    labeller: Labeller | None
    emit: Emit


def evaluate_unlabelled(
    run_dir: Path, emit: Emit, show: Callable[[Scores], None], best: bool = False
) -> Scores:
    """Evaluate a run without labels, and record the scores in `evaluations/STEP-unlabelled.json`.

    What cannot be measured is left out, and `emit` is given the reason. Raises `DataError` where
    nothing can.
    """
    run = open_run(run_dir)
    checkpoint = chosen_checkpoint(run, emit, best)
    with open_own(run) as index:
        asked = _Asked(run, checkpoint, index, _drawn(run, index), _labeller(run, best, emit), emit)
        scores: Scores = {}
        for name, measure in MEASURES.items():
            try:
                scores[name] = dict(measure(asked))
            except (Skipped, DeepclustError) as error:
                emit(f"{name} is not evaluated: {error}")
    if not scores:
        raise DataError(f"{run.path} has nothing that can be measured without labels")
    show(scores)
    step, places = checkpoint.state.step, described(run.recipe.data.shards)
    record = {"step": step, "train": places, "test": NO_LABELS, "scores": scores}
    keep_record(run, run.path / "evaluations" / f"{step:08d}-unlabelled.json", record, emit)
    return scores


def _crops(asked: _Asked) -> Scored:
    """Yield "cosine" of two crops of an image, that of other images, and how many are "found"."""
    embed = embedder_of(asked.run, asked.checkpoint)
    one, other = _embedded(asked, embed, _random_crops(asked.run.recipe.data))
    yield from with_interval("cosine", agreement.cosines(one, other), asked.run.recipe.seed)
    yield "cosine_of_others", agreement.others_cosine(one, other)
    yield "found", float(agreement.finds_other_crop(one, other).mean())
    yield "found_by_chance", 1 / len(one)
    yield "images", float(len(one))


def _crops_clusters(asked: _Asked) -> Scored:
    """Yield the share of images whose two crops have the "same" cluster, and that of others."""
    if asked.labeller is None:
        raise Skipped(f"{asked.run.recipe.method.name} has no clusters")
    labeller = asked.labeller
    rows = _embedded(asked, labeller.rows, _random_crops(asked.run.recipe.data))
    one, other = (label(labeller.rule, part).clusters for part in rows)
    yield from with_interval("same", one == other, asked.run.recipe.seed)
    yield "same_of_others", agreement.others_together(one, other)
    yield "images", float(len(one))


def _neighbours(asked: _Asked) -> Scored:
    """Yield the share of each image's neighbours that are "shared" with an earlier checkpoint."""
    earlier = _earlier(asked.run, asked.checkpoint)
    data = asked.run.recipe.data
    crops = (Crop(CentreCrop(data.size, data.short_side)),)
    now, before = (
        _embedded(asked, embedder_of(asked.run, saved), crops)[0]
        for saved in (asked.checkpoint, earlier)
    )
    shared = agreement.shared_neighbours(now, before)
    yield from with_interval("shared", shared, asked.run.recipe.seed)
    yield "by_chance", agreement.NEIGHBOURS / (len(now) - 1)
    yield "with_step", float(earlier.state.step)
    yield "images", float(len(now))


def _rounds(asked: _Asked) -> Scored:
    """Yield the share of images in the "same" cluster in the last two rounds, and their NMI."""
    rounds = asked.run.rounds()
    if len(rounds) < 2:
        raise Skipped(f"{asked.run.path} has {len(rounds)} rounds, and two are compared")
    before, now = (read_assignments(asked.run, number)[0] for number in rounds[-2:])
    stayed = agreement.keeps_cluster(before, now)
    yield from with_interval("same", stayed, asked.run.recipe.seed)
    both = (before >= 0) & (now >= 0)
    yield "nmi", nmi(before[both], now[both])
    yield "images", float(len(stayed))


MEASURES: dict[str, Callable[[_Asked], Scored]] = {
    "crops": _crops,
    "crops_clusters": _crops_clusters,
    "neighbours": _neighbours,
    "rounds": _rounds,
}


def _labeller(run: Run, best: bool, emit: Emit) -> Labeller | None:
    """Return what tells clusters, None for a run that has none."""
    if run.recipe.cluster is None and not run.recipe.assigns:
        return None
    try:
        return best_labeller_of(run, emit) if best else labeller_of(run, None, emit)
    except DeepclustError as error:  # no round yet, for example
        emit(f"crops_clusters: {error}")
        return None


def _earlier(run: Run, checkpoint: Checkpoint) -> Checkpoint:
    """Return the newest kept checkpoint of an earlier round, or else of an earlier step."""
    states = [(folder, read_state(folder)) for folder in run.checkpoints()]
    earlier = [(f, state) for f, state in states if state.step < checkpoint.state.step]
    if not earlier:
        raise Skipped(
            f"{run.path} has kept no checkpoint before step {checkpoint.state.step}. Keep more of "
            "the next run: keep.checkpoints=3"
        )
    of_rounds = [one for one in earlier if one[1].round < checkpoint.state.round]
    folder = (of_rounds or earlier)[-1][0]
    return Checkpoint(folder, *load(folder, alive=run.alive))


def _drawn(run: Run, index: Index) -> Int64[np.ndarray, " n"]:
    """Return the samples that are asked, at most IMAGES, drawn by the seed, in order."""
    usable = np.setdiff1d(np.arange(len(index)), np.array(sorted(index.excluded), np.int64))
    if len(usable) > IMAGES:
        random = generator(run.recipe.seed, "evaluate", "unlabelled")
        usable = np.sort(random.choice(usable, IMAGES, replace=False))
    return usable


def _random_crops(data: Data) -> tuple[Crop, Crop]:
    crop = Crop(RandomResizedCrop(data.size, data.crop_scale, data.crop_ratio, data.flip))
    return crop, crop


def _embedded(
    asked: _Asked, embed: Callable[[Tensor], Tensor], crops: tuple[Crop, ...]
) -> list[Float32[np.ndarray, "n d"]]:
    """Return what is embedded of each crop of the readable images, in order."""
    data, seed = asked.run.recipe.data, asked.run.recipe.seed
    sample_ids = asked.sample_ids
    starts = range(0, len(sample_ids), data.extract_batch)
    requests = (
        Request(part, positions=part, key=derive(seed, "two crops"), crops=crops)
        for part in (sample_ids[start : start + data.extract_batch] for start in starts)
    )
    readers = min(data.readers(), cores())
    loader = Loader(asked.index, readers, max_pixels=data.max_pixels, decode=data.decode)
    rows: list[list[np.ndarray]] = [[] for _ in crops]
    try:
        for loaded in loader.stream(requests):
            good = ~np.isin(loaded.sample_ids, [bad.sample_id for bad in loaded.bad])
            for own, images in zip(rows, loaded.images, strict=True):
                own.append(embed(images).float().cpu().numpy()[good])
    finally:
        loader.close()
    joined = [np.concatenate(own) for own in rows]
    if len(joined[0]) < 2:
        raise DataError(f"fewer than two images of {asked.index.origin} can be read")
    return joined
