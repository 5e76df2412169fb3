"""kNN on labelled images while a run is trained (`train.evaluate`), and the best checkpoint by it.

Weighted 20-NN (`evaluate/knn.py`) asks every query image for its neighbours in a bank of labelled
images. Both are the same at every evaluation, drawn by the seed:

    train.evaluate_data   bank                        queries
    given                 the labelled images of      its labelled images
                          the training shards
    given, training       four fifths of them         a fifth of its labelled images
    shards unlabelled
    none                  four fifths                 a fifth of the labelled images of the
                                                      training shards, without labelled seeds

Nothing of it changes the training. Batches are shared by the ranks. Each has the norm statistics of
rank 0 meanwhile, which a checkpoint holds, and gets its own back. The record in metrics.jsonl is
written last, so an evaluation that a kill has cut short is made again after the resume.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.find import described
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DiskError, RecipeError
from deepclust.evaluate.frozen import Frozen, Split, check, class_names, join_classes
from deepclust.evaluate.knn import knn
from deepclust.methods.base import Method
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data
from deepclust.run.best import find_best, keep_best
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run
from deepclust.seeds.table import load as load_seeds
from deepclust.stages.data_index import open_labelled
from deepclust.stages.schedule import MOST_BANK, MOST_QUERIES, QUERIES
from deepclust.world import World, generator

if TYPE_CHECKING:
    from deepclust.stages.train import Trainer


@dataclass(frozen=True)
class Part:
    """Labelled images: samples of an index, in order, and their positions in the classes."""

    index: Index
    sample_ids: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class Watched:
    """What is asked at every evaluation, and a digest of it."""

    classes: list[str]
    bank: Part
    queries: Part
    digest: str


def open_watched(recipe: Recipe, index: Index, run: Run, world: World) -> Watched | None:
    """Return what the recipe wants evaluated, or None.

    All ranks call it. Raises `DataError` where there are no labels, or too few.
    """
    if recipe.train.evaluate is None:
        return None
    given = recipe.train.evaluate_data
    other = None if given is None else _open(given, recipe, run, world)
    if other is None and index.labels is None:
        raise DataError(
            f"train.evaluate: {described(recipe.data.shards)} has no labels to evaluate on. Give "
            "labelled images in train.evaluate_data, or leave train.evaluate out"
        )
    if other is not None and other.labels is None:
        raise DataError(f"train.evaluate_data: {given} has no labels. Give labelled images")
    if other is not None and index.labels is not None:
        parts = _drawn(index, recipe.seed)[:MOST_BANK], _drawn(other, recipe.seed)[:MOST_QUERIES]
        return _watched((index, other), parts)
    source = index if other is None else other
    taken = _seeded(index, recipe) if other is None else np.empty(0, np.int64)
    return _watched((source, source), _halves(source, recipe.seed, taken))


def _open(given: str, recipe: Recipe, run: Run, world: World) -> Index:
    """Return the index of other images, which rank 0 writes: beside them, or else in the run."""
    name = hashlib.blake2b(given.encode(), digest_size=4).hexdigest()
    own = run.path / "evaluations" / f"index-{name}"

    def opened() -> Index:
        with contextlib.suppress(DiskError, RecipeError):
            return open_labelled(given, recipe.data)
        return open_labelled(given, recipe.data, own)

    error: Exception | None = None
    if world.is_first:
        try:
            index = opened()
        except DataError as problem:
            error = DataError(f"train.evaluate_data: {problem}")
    world.raise_all(error, "train.evaluate_data")
    return index if world.is_first else opened()


def _drawn(index: Index, seed: int) -> Int64[np.ndarray, " n"]:
    """Return the labelled samples of an index in an order that the seed draws."""
    known = np.flatnonzero(np.asarray(index.labels) >= 0)
    return generator(seed, "evaluate").permutation(known)


def _seeded(index: Index, recipe: Recipe) -> Int64[np.ndarray, " s"]:
    """Return the samples whose labels training may use."""
    if recipe.seeds is None:
        return np.empty(0, np.int64)
    return np.asarray(load_seeds(index, recipe.seeds, recipe.seed).table.sample_ids)


def _halves(
    index: Index, seed: int, taken: Int64[np.ndarray, " s"]
) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " q"]]:
    """Return the samples of bank and queries, of one index; none of the queries is in `taken`."""
    drawn = _drawn(index, seed)
    free = drawn[~np.isin(drawn, taken)]
    queries = free[: min(int(QUERIES * len(drawn)), MOST_QUERIES)]
    bank = drawn[~np.isin(drawn, queries)]
    return bank[:MOST_BANK], queries


def _watched(indexes: tuple[Index, Index], samples: tuple[np.ndarray, np.ndarray]) -> Watched:
    """Return bank and queries of samples, with labels by class name."""
    names = [class_names(index) for index in indexes]
    classes, _ = join_classes(names, indexes)
    number = {name: i for i, name in enumerate(classes)}
    hashed, parts = hashlib.blake2b(digest_size=8), []
    for index, own, ids in zip(indexes, names, samples, strict=True):
        ids = np.sort(ids)
        given = np.asarray(index.labels)[ids]
        labels = np.array([number[own[y]] for y in given.tolist()], np.int64)
        hashed.update(index.fingerprint.encode() + ids.tobytes() + labels.tobytes())
        parts.append(Part(index, ids, labels))
    bank, queries = parts
    if len(np.unique(bank.labels)) < 2 or len(queries.labels) == 0:
        raise DataError(
            f"train.evaluate: {len(bank.labels)} labelled images of "
            f"{len(np.unique(bank.labels))} classes, and {len(queries.labels)} to ask for, are too "
            "few. Label more images, or give some in train.evaluate_data"
        )
    return Watched(classes, bank, queries, hashed.hexdigest())


def is_recorded(trainer: Trainer, state: State) -> bool:
    """Return whether the run has the record of an evaluation at a state; the same on all ranks."""
    known = trainer.world.is_first and any(
        record["step"] == state.step for record in trainer.run.metrics("evaluate")
    )
    return trainer.world.broadcast_object(known)


def evaluate_now(trainer: Trainer, state: State) -> None:
    """Score the present weights, keep them if they are the best so far, and record it.

    All ranks call it, between two steps. What cannot be scored is a warning: training goes on.
    """
    watched, began = trainer.watched, time.monotonic()
    assert watched is not None
    with norms_of_first(trainer.method, trainer.world):
        splits = [_embed(trainer, part) for part in (watched.bank, watched.queries)]
    trainer.model.train()
    trainer.world.barrier()  # kNN has no time limit, as a collective has
    score = _score(trainer, watched, splits, state) if trainer.world.is_first else None
    trainer.world.barrier()
    score = trainer.world.broadcast_object(score)
    if score is None:
        return
    best = _keep_if_best(trainer, state, score["top1"], watched.digest)
    if trainer.metrics is not None:
        when = {"epoch": trainer.timeline.now(state).epochs, "round": state.round}
        trainer.report.event("evaluated", step=state.step, best=best, **when, top1=score["top1"])
        seconds = time.monotonic() - began
        trainer.metrics.record("evaluate", state.step, **when, **score, best=best, seconds=seconds)


def _keep_if_best(trainer: Trainer, state: State, top1: float, digest: str) -> int:
    """Keep the state as the best one, if it is, and return the step of the best."""
    best = find_best(trainer.run) if trainer.world.is_first else None
    stays = best is not None and best.data == digest and best.top1 >= top1
    kept: int | None = trainer.world.broadcast_object(best.step if best and stays else None)
    if kept is not None:
        return kept
    trainer.save(state)
    if trainer.world.is_first:
        keep_best(trainer.run, state.step, top1, digest)
    trainer.world.barrier()
    return state.step


def _embed(trainer: Trainer, part: Part) -> Split:
    """Return the features of the images that can be read, on every rank; each embeds a share."""
    world, data, embed = trainer.world, trainer.recipe.data, trainer.embedder
    parts = np.array_split(np.arange(len(part.labels)), -(-len(part.labels) // data.extract_batch))
    width = embed(torch.zeros(1, 3, data.size, data.size, dtype=torch.uint8)).shape[1]
    rows = torch.zeros(len(part.labels), width, device=world.device)
    readable = torch.zeros(len(part.labels), device=world.device)
    own = parts[world.rank :: world.size]
    loader = Loader(
        part.index,
        data.readers(),
        max_pixels=data.max_pixels,
        decode=data.decode,
        device=world.device,
    )
    try:
        for places, loaded in zip(own, loader.stream(_requests(part, own, data)), strict=True):
            trainer.report.alive()
            rows[places] = embed(loaded.images[0]).to(rows)
            bad = [one.sample_id for one in loaded.bad]
            fine = torch.from_numpy(~np.isin(part.sample_ids[places], bad))
            readable[places] = fine.to(readable)
    finally:
        loader.close()
    world.barrier()  # reading has no time limit, as a collective has
    used = world.all_reduce(readable).cpu().numpy() > 0
    features = world.all_reduce(rows).cpu().numpy()
    return Split(features[used], part.labels[used], part.sample_ids[used])


def _requests(part: Part, places: list[Int64[np.ndarray, " b"]], data: Data) -> Iterator[Request]:
    crops = (Crop(CentreCrop(data.size, data.short_side)),)
    for rows in places:
        ids = part.sample_ids[rows]
        yield Request(ids, positions=ids, key=0, crops=crops)


def _score(
    trainer: Trainer, watched: Watched, splits: list[Split], state: State
) -> dict[str, Any] | None:
    """Return the score of kNN with its interval, and the images; None after a warning."""
    bank, queries = splits
    unread = len(watched.bank.labels) + len(watched.queries.labels)
    unread -= len(bank.labels) + len(queries.labels)
    frozen = Frozen(watched.classes, bank, queries, seed=trainer.recipe.seed)
    try:
        if unread:
            text = f"step {state.step}: {unread} images of train.evaluate cannot be read"
            trainer.report.event("warning", text=text)
        if not (len(bank.labels) and len(queries.labels)):
            raise DataError("no image can be read")
        check(frozen)
    except DataError as error:
        text = f"step {state.step} is not evaluated: {error}"
        trainer.report.event("warning", text=text)
        return None
    values: dict[str, Any] = dict(knn(frozen))
    low, high = values["interval"]
    sizes = {"bank": len(bank.labels), "queries": len(queries.labels)}
    return {"top1": values["top1"], "low": low, "high": high, **sizes}


@contextlib.contextmanager
def norms_of_first(method: Method, world: World) -> Iterator[None]:
    """Give all ranks the norm statistics of rank 0 in the block, and their own after it."""
    statistics = norm_statistics(method)
    own = [one.clone() for one in statistics]
    world.broadcast(statistics)
    try:
        yield
    finally:
        for one, before in zip(statistics, own, strict=True):
            one.copy_(before)


def norm_statistics(method: Method) -> list[Tensor]:
    """Return the running statistics of all batch norms.

    Other buffers may differ between ranks.
    """
    norms = (module for module in method.modules() if isinstance(module, _NormBase))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
