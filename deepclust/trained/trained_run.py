"""A trained run, to ask for features and clusters of any images.

    run = load_run("runs/a")
    run.embed(images)      # float32 [b, D]
    run.predict(images)    # Prediction: clusters, distances, margins, and classes where seeded

Images are paths, Pillow images, or uint8 arrays [h, w, 3] or tensors [3, h, w] of any size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int32, UInt8
from PIL import Image
from torch import Tensor

from deepclust.data.images.crops import CentreCrop
from deepclust.data.images.decode import DecodeError
from deepclust.data.images.reduced import decode_for
from deepclust.errors import DataError, DeepclustError, RecipeError, shown
from deepclust.files import reading
from deepclust.methods.base import Method
from deepclust.methods.embed import Embedder
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data
from deepclust.run import final_round
from deepclust.run.best import load_best
from deepclust.run.checkpoint import Checkpoint
from deepclust.run.directory import Run, has_file, manifest, open_run
from deepclust.run.round_files import read_facts
from deepclust.trained.answers import columns_of
from deepclust.trained.class_means import by_means
from deepclust.trained.labelling import (
    Answers,
    Labels,
    Projection,
    Rule,
    label,
    projection_of,
    rule_of,
)
from deepclust.trained.saved import Tell, checkpoint_of_round, embedder_of, newest

log = logging.getLogger("deepclust")


@dataclass(frozen=True)
class Labeller:
    """What says which cluster an image is in: the network of a run, and the rule for its rows.

    `round` is that of the rule, None for answers. `step` is that of the weights. `classes` has the
    class name of each cluster [k + 1], None for free ones and in the last place. Where a method has
    no clusters, and labels, the classes are its clusters, by the nearest class mean.
    """

    embedder: Embedder
    rule: Rule
    projection: Projection | None
    round: int | None
    step: int
    classes: np.ndarray | None

    @property
    def dim(self) -> int:
        """The width of what the network gives, before the projection."""
        return self.embedder.clustered(no_image(self.embedder.data)).shape[1]

    def rows(self, images: UInt8[Tensor, "b 3 s s"]) -> Tensor:
        """Return the rows of cropped images, that the rule is asked with."""
        if self.projection is None:
            return self.embedder.answered(images)
        return self.projection(self.embedder.clustered(images))

    def named(self, labels: Labels) -> tuple[np.ndarray, Float32[np.ndarray, " m"] | None]:
        """Return the classes of labels, and of answers their probability, NaN without a class."""
        assert self.classes is not None
        names = self.classes[labels.clusters]
        if not isinstance(self.rule, Answers):
            return names, None
        free = np.array([name is None for name in names], bool)
        return names, np.where(free, np.nan, np.exp(-labels.distances)).astype(np.float32)


def labeller_of(run: Run, round: int | None = None, tell: Tell = log.warning) -> Labeller:
    """Return the labeller of a run: by a round (default: the last), or by its own answers.

    `tell` is given what is odd about the weights. Raises `RecipeError` for a run that has neither
    clusters nor labels.
    """
    if _answers(run.recipe):
        if round is not None:
            raise RecipeError(NO_ROUNDS.format(run.path, run.recipe.method.name))
        return _by_answers(run, newest(run, tell), tell)
    number = choose_round(run, round)
    return _by_round(run, checkpoint_of_round(run, number, tell), number)


def best_labeller_of(run: Run, tell: Tell = log.warning) -> Labeller:
    """Return the labeller of a run's best checkpoint, by the round that its weights made.

    Where none was made with them it is the round that they were trained on, and `tell` hears it.
    Raises `RecipeError` for a run without clusters or labels, or without a best checkpoint.
    """
    saved = load_best(run)
    if _answers(run.recipe):
        return _by_answers(run, saved, tell)
    choose_round(run, None)  # raises for a run without clusters
    number = made_with(run, saved.state.step)
    if number is None:
        number = saved.state.round
        tell(
            f"warning: no round was made with the weights of step {saved.state.step}, the best by "
            f"kNN. The clusters are of round {number}, which they were trained on"
        )
    return _by_round(run, saved, number)


def made_with(run: Run, step: int) -> int | None:
    """Return the newest round whose features were made with the weights of a step, if any."""
    begun: dict[int, int] = {}
    for event in run.events() if not run.recipe.clustering.overlap else ():
        if event["event"] == "training":
            begun.setdefault(event["round"], event["step"])
    made = [n for n in run.rounds() if step == (final_round.step_of(run, n) or begun.get(n))]
    return made[-1] if made else None


def namer_of(run: Run, labeller: Labeller, tell: Tell) -> Labeller | None:
    """Return what names images by class: the labeller, or class means where its clusters have none.

    It is None without labels, and where there are no class means: `tell` hears why.
    """
    if labeller.classes is not None:
        return labeller
    if run.recipe.seeds is None:
        return None
    try:
        embedder = by_means(run, labeller.embedder, labeller.step, tell)
    except DeepclustError as error:
        tell(f"warning: images have clusters and no class: {error}")
        return None
    return _asked(run, embedder, labeller.step)


def _answers(recipe: Recipe) -> bool:
    """Return whether images are answered without rounds: by the network, or by class means."""
    return recipe.cluster is None and (recipe.assigns or recipe.seeds is not None)


def _by_answers(run: Run, saved: Checkpoint, tell: Tell) -> Labeller:
    embedder, step = embedder_of(run, saved), saved.state.step
    if not run.recipe.assigns:
        embedder = by_means(run, embedder, step, tell)
    return _asked(run, embedder, step)


def _asked(run: Run, embedder: Embedder, step: int) -> Labeller:
    width = embedder.answered(no_image(run.recipe.data)).shape[1]
    classes = answered_classes(run, embedder.method)
    return Labeller(embedder, Answers(width), None, None, step, classes)


def _by_round(run: Run, saved: Checkpoint, number: int) -> Labeller:
    embedder, classes = embedder_of(run, saved), seeded_classes(run, number)
    projection, step = projection_of(run, number), saved.state.step
    return Labeller(embedder, rule_of(run, number), projection, number, step, classes)


NO_ROUNDS = (
    "{} is a run of method {}, which has no rounds: its network answers for itself. Leave "
    "--round out"
)


def no_image(data: Data) -> UInt8[Tensor, "1 3 s s"]:
    """Return a black image, to learn the width of what a network gives."""
    return torch.zeros(1, 3, data.size, data.size, dtype=torch.uint8)


def choose_round(run: Run, wanted: int | None) -> int:
    """Return the wanted round, or the last.

    `RecipeError` names the rounds that there are.
    """
    rounds, recipe = run.rounds(), run.recipe
    if recipe.cluster is None:
        raise RecipeError(
            f"{run.path} is a run of method {recipe.method.name}, which has no clusters. It has a "
            f"backbone: deepclust export {run.path} --out backbone.safetensors"
        )
    lost = run.lost_round()
    if wanted is None and lost is not None:
        raise DataError(
            f"round {lost} of {run.path} was clustered, and its files are missing or not whole: it "
            "has no DONE. Copy them back, or choose another round with --round"
        )
    if not rounds:
        raise RecipeError(
            f"{run.path} has no finished round yet. Continue it: deepclust resume {run.path}"
        )
    if wanted is not None and wanted not in rounds:
        there = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        raise RecipeError(f"{run.path} has no round {wanted}; there are {len(rounds)}: {there}")
    return rounds[-1] if wanted is None else wanted


def answered_classes(run: Run, method: Method) -> np.ndarray | None:
    """Return the class of each answer and, for images without one, None behind them."""
    columns = columns_of(run, run.recipe, method)
    if isinstance(columns, str):  # it answers no classes
        return None
    named = [columns.classes[c] if c >= 0 else None for c in columns.class_of]
    return np.array([*named, None], dtype=object)


def seeded_classes(run: Run, number: int) -> np.ndarray | None:
    """Return the class name of every cluster [k + 1], or None for a round without seeds.

    It is None for free clusters, and in the last place, which excluded samples (-1) index.
    """
    stage = run.round(number) / "centroids"
    if run.recipe.seeds is None or not has_file(stage, "prototypes.json"):
        return None
    k, supers = run.recipe.clustering.k, seeded_supers(run, number)
    each = 1 if supers is None else k // supers
    names = np.full(k + 1, None, dtype=object)
    # of super-clusters, where there are two levels
    for one in read_facts(stage, "prototypes.json")["clusters"]:
        names[one["cluster"] * each : (one["cluster"] + 1) * each] = one["class"]
    return names


def seeded_supers(run: Run, number: int) -> int | None:
    """Return the number of super-clusters of a two-level round, whose seeds are of those."""
    supers: int | None = manifest(run.round(number) / "assignments")["inputs"].get("supers")
    return supers


@dataclass(frozen=True)
class Prediction:
    """The clusters of some images, see `labelling.Labels`, and their classes where labels are.

    A class is None in a free cluster. `confidences` are probabilities of the classes, NaN without
    one, and None where classes are those of clusters of a round.
    """

    clusters: Int32[np.ndarray, " b"]
    classes: list[str | None] | None
    distances: Float32[np.ndarray, " b"]
    seconds: Int32[np.ndarray, " b"]
    margins: Float32[np.ndarray, " b"]
    confidences: Float32[np.ndarray, " b"] | None = None

    def __repr__(self) -> str:
        used = len(np.unique(self.clusters))
        return f"Prediction({len(self.clusters):,} images in {used:,} clusters)"


class TrainedRun:
    """A run to ask for features and clusters of images."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.run.path)!r})"

    def _repr_html_(self) -> str:
        return self.run._repr_html_()

    @cached_property
    def labeller(self) -> Labeller:
        """What tells the clusters, read when first asked."""
        return labeller_of(self.run)

    @cached_property
    def namer(self) -> Labeller | None:
        """What tells the classes, None for a run without labels."""
        return namer_of(self.run, self.labeller, log.warning)

    @cached_property
    def _embedder(self) -> Embedder:
        return embedder_of(self.run, newest(self.run, log.warning))

    def embed(self, images: Iterable[object]) -> Float32[np.ndarray, "b D"]:
        """Return the features of images by the weights that are exported."""
        parts = [self._embedder(part).cpu().numpy() for part in _cropped(images, self._data)]
        return np.concatenate(parts) if parts else np.zeros((0, self._dim), np.float32)

    def predict(self, images: Iterable[object], head: int = 0) -> Prediction:
        """Return the clusters of images, of one of the run's clusterings, and their classes.

        Raises `RecipeError` for a run without clusters and labels, and `DataError` for anything
        that is not an image.
        """
        rule, namer = self.labeller.rule, self.namer
        if not 0 <= head < rule.heads:
            raise RecipeError(f"head {head}: {self.run.path} has heads 0 to {rule.heads - 1}")
        parts = [self._labels(part, head) for part in _cropped(images, self._data)]
        if not parts:
            none = np.zeros(0, np.float32)
            return Prediction(none.astype(np.int32), [], none, none.astype(np.int32), none)
        known, own = (Labels.joined(list(labels)) for labels in zip(*parts, strict=True))
        names, sure = (None, None) if namer is None else namer.named(own)
        classes = None if names is None else names.tolist()
        return Prediction(
            known.clusters, classes, known.distances, known.seconds, known.margins, sure
        )

    def _labels(self, images: UInt8[Tensor, "b 3 s s"], head: int) -> tuple[Labels, Labels]:
        """Return the labels of crops, and those that say their classes."""
        labeller, namer = self.labeller, self.namer
        known = label(labeller.rule, labeller.rows(images).cpu(), head)
        if namer is None or namer is labeller:
            return known, known
        return known, label(namer.rule, namer.rows(images).cpu())

    @property
    def _data(self) -> Data:
        return self.run.recipe.data

    @property
    def _dim(self) -> int:
        return self._embedder.method.trunk.dim


def load_run(run: str | Path) -> TrainedRun:
    """Return a trained run, to embed and label images with; raises `RecipeError` for no run."""
    return TrainedRun(open_run(run))


def _cropped(images: Iterable[object], data: Data) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
    """Yield the centre crops of images, some hundred at a time."""
    if isinstance(images, str | Path):
        raise DataError("give a list of images: of one, [image]")
    crop = CentreCrop(data.size, data.short_side)
    numbered = enumerate(images)
    while part := list(itertools.islice(numbered, data.extract_batch)):
        yield torch.stack([crop(_pixels(image, i, crop, data)) for i, image in part])


def _pixels(image: object, number: int, crop: CentreCrop, data: Data) -> UInt8[Tensor, "3 h w"]:
    """Return an image as pixels for its crop, or raise `DataError` that says which one is none."""
    try:
        if isinstance(image, str | Path):
            with reading(Path(image)):
                file = Path(image).read_bytes()
                return decode_for([(crop, None)], file, data.max_pixels, data.decode)
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
            image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    except DecodeError as error:
        raise DataError(f"image {number}, {shown(str(image))}: {error}") from error
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and _is_colour(image):
        return image
    raise DataError(
        f"image {number} is none: give a path, a Pillow image, or uint8 numbers [h, w, 3] of an "
        "array or [3, h, w] of a tensor"
    )


def _is_colour(image: Tensor) -> bool:
    return image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
