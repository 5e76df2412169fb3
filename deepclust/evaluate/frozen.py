"""What evaluators measure: features of a frozen network, with labels compared by class name.

`freeze` takes arrays, `freeze_shards` embeds labelled shards. Two tables may number their classes
differently, so both are renumbered by name into the list `Frozen.classes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt8
from torch import Tensor

from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.label_sets import is_set
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.index import Index
from deepclust.errors import DataError
from deepclust.models import Backbone
from deepclust.recipe.sections import Data

Embed: TypeAlias = Callable[[UInt8[Tensor, "b 3 s s"]], Float32[Tensor, "b d"]]
Labelled: TypeAlias = tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"] | None]
Classify: TypeAlias = Callable[[Float[np.ndarray, "b d"]], Float[Tensor, "b k"]]

LABEL = "Pack them from class folders, add a KEY.cls to each sample, or name other shards."
SETS = (
    "some labels name several classes (a|b), which are one class of their own to all evaluators "
    "but multi_label: --with multi_label"
)
DIM = 64  # directions that the whitening keeps where no recipe says how many


class Skipped(Exception):
    """An evaluator cannot measure these features.

    The message says why.
    """


@dataclass(frozen=True)
class Split:
    """The labelled samples of the training or the test shards."""

    features: Float[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]  # positions in `Frozen.classes`
    sample_ids: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class SeedRows:
    """The rows of the training split that were labelled seeds in pretraining."""

    rows: Int64[np.ndarray, " s"]
    labels: Int64[np.ndarray, " s"]  # positions in `Frozen.classes`
    refine: float = 0.0  # of the recipe, seeds.refine


class Table(TypedDict):
    """Values by the names of rows and columns, None where there is none.

    JSON and the report show it as it is.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


Value: TypeAlias = float | list[float] | Table  # a number, an interval [low, high], a table


@dataclass(frozen=True)
class Answers:
    """What a run itself answers: logits over columns, some of which are classes of its seeds.

    `class_of` has the position in `classes` of every column, and -1 for a free one, a cluster or a
    prototype that stands for no class. `labels` counts the labels that each class had in training.
    """

    classify: Classify  # of features, on the device of the network
    classes: tuple[str, ...]
    class_of: Int64[np.ndarray, " k"]
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FineTuning:
    """The settings of fine-tuning (`finetune.py`), the same for every network."""

    epochs: int = 10
    lr: float = 0.01  # of the network
    head_lr: float = 0.1  # of the new classifier, which begins with zeros
    batch: int = 64
    weight_decay: float = 1e-4
    seeds: int = 1  # runs, of other orders and crops
    least: int = 100  # steps: few images have more epochs

    def steps(self, n: int) -> int:
        """Return the steps on so many images."""
        return max(self.least, self.epochs * (n // min(self.batch, n)))


@dataclass(frozen=True)
class Images:
    """Where the features come from: a network, and the images of both splits."""

    backbone: Backbone
    indexes: tuple[Index, Index]
    data: Data


@dataclass(frozen=True)
class Frozen:
    """Features and labels of both splits, and the facts of the recipe that evaluators use."""

    classes: list[str]
    train: Split
    test: Split
    dim: int = DIM  # of the recipe, cluster.dim
    seed: int = 0  # of every random choice
    seeds: SeedRows | None = None
    seeds_missing: str = "no labelled seeds were given"  # why there are no seeds
    notes: tuple[str, ...] = ()  # what is odd about the labels
    embed: Embed | None = None  # the network, where the features come from one
    images: Images | None = None  # and where it may be trained on its images
    finetuning: FineTuning = FineTuning()
    answers: Answers | None = None
    answers_missing: str = "no classifier was given"  # why there are no answers


def freeze(
    train: Labelled,
    test: Labelled,
    seed: int = 0,
    dim: int = DIM,
    seeds: SeedRows | None = None,
) -> Frozen:
    """Return what evaluators measure, from (features [n, d], labels [n]) of both splits.

    `seeds.labels` are numbers as in `train`. A label's decimal digits are its class name. Raises
    `DataError` for labels that are missing (None or -1), and what `check` raises.
    """
    labels = [_labels(name, *split) for name, split in (("train", train), ("test", test))]
    given = np.unique(np.concatenate([*labels, [] if seeds is None else seeds.labels]))
    given = given.astype(np.int64)

    def split(x: Float[np.ndarray, "n d"], y: Int[np.ndarray, " n"]) -> Split:
        return Split(x, np.searchsorted(given, y), np.arange(len(y)))

    if seeds is not None:
        seeds = replace(seeds, labels=np.searchsorted(given, seeds.labels))
    frozen = Frozen(
        [str(label) for label in given],
        split(train[0], labels[0]),
        split(test[0], labels[1]),
        dim=dim,
        seed=seed,
        seeds=seeds,
    )
    check(frozen)
    return frozen


def freeze_shards(embed: Embed, train: Index, test: Index, data: Data, dim: int = DIM) -> Frozen:
    """Return what evaluators measure, from labelled shards and a network.

    Raises `DataError` for shards without labels, for two tables that share no class name, for
    more unreadable images than `data.max_bad` allows, and what `check` raises.
    """
    splits = [embed_labelled(embed, index, data) for index in (train, test)]
    names = [class_names(index) for index in (train, test)]
    classes, notes = join_classes(names, (train, test))
    number = {name: i for i, name in enumerate(classes)}
    fit, score = (
        replace(split, labels=np.array([number[own[y]] for y in split.labels.tolist()], np.int64))
        for split, own in zip(splits, names, strict=True)
    )
    unknown = [classes[i] for i in np.setdiff1d(score.labels, fit.labels)]
    if any(map(is_set, classes)):
        notes.append(SETS)
    elif unknown:
        wrong = int(np.isin(score.labels, fit.labels, invert=True).sum())
        notes.append(
            f"{wrong} of {len(score.labels)} test images are of {len(unknown)} classes without a "
            f"training image ({', '.join(unknown[:5])}): they count as wrong"
        )
    frozen = Frozen(classes, fit, score, dim=dim, embed=embed, notes=tuple(notes))
    check(frozen)
    return frozen


def embed_labelled(embed: Embed, index: Index, data: Data) -> Split:
    """Return features and labels of every readable, labelled sample, in sample order.

    Images are cropped at the centre, as in extraction. Labels are the numbers of the index.
    """
    if index.labels is None:
        raise DataError(f"{folder_of(index)} has no labels, and evaluation needs them. {LABEL}")
    labels = np.asarray(index.labels).astype(np.int64)
    sample_ids = np.flatnonzero(labels >= 0)
    if len(sample_ids) == 0:
        raise DataError(f"no sample of {folder_of(index)} has a label. {LABEL}")
    rows, usable = embed_samples(embed, index, data, sample_ids)
    sample_ids = sample_ids[usable]
    return Split(rows[usable], labels[sample_ids], sample_ids)


def embed_samples(
    embed: Embed, index: Index, data: Data, sample_ids: Int64[np.ndarray, " n"]
) -> tuple[Float32[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
    """Return features of samples, and whether the image of each could be read.

    Raises `DataError` for more unreadable images than `data.max_bad` allows.
    """
    parts = np.array_split(sample_ids, max(1, len(sample_ids) // data.extract_batch))
    crops = (Crop(CentreCrop(data.size, data.short_side)),)
    requests = (Request(part, positions=part, key=0, crops=crops) for part in parts)
    rows, readable, bad = [], [], []
    loader = Loader(index, data.readers(), max_pixels=data.max_pixels, decode=data.decode)
    try:
        for loaded in loader.stream(requests):
            rows.append(embed(loaded.images[0]).cpu().numpy())
            readable.append(~np.isin(loaded.sample_ids, [bad.sample_id for bad in loaded.bad]))
            bad += loaded.bad
            if len(bad) > data.max_bad * len(sample_ids):  # no later image can make it better
                raise DataError(
                    f"{len(bad)} of {len(sample_ids)} images of {folder_of(index)} cannot be read, "
                    f"more than data.max_bad={data.max_bad} allows; the first: {bad[0].reason}. "
                    "Repair the shards, or name others."
                )
    finally:
        loader.close()
    return np.concatenate(rows), np.concatenate(readable)


def class_names(index: Index) -> dict[int, str]:
    """Return the name of every label of an index.

    A label without a name has its decimal digits.
    """
    assert index.labels is not None
    names = dict(enumerate(map(str, index.class_names or [])))
    used = np.unique(index.labels)
    digits = {int(label): str(label) for label in used[used >= 0] if int(label) not in names}
    return {**names, **digits}


def join_classes(
    names: list[dict[int, str]], indexes: tuple[Index, Index]
) -> tuple[list[str], list[str]]:
    """Return the classes of both tables, and notes on what is odd about them."""
    train, test = indexes
    classes = list(dict.fromkeys([*names[0].values(), *names[1].values()]))
    if not set(names[0].values()) & set(names[1].values()):
        first = [list(own.values())[:5] for own in names]
        raise DataError(
            f"{folder_of(train)} and {folder_of(test)} share no class name ({first[0]} and "
            f"{first[1]}). Use one table of names for both (class_names in dataset.json)."
        )
    named = [index.class_names is not None for index in indexes]
    if not any(named):
        return sorted(classes, key=int), []
    if all(named):
        return classes, []
    bare = folder_of(indexes[named.index(False)])
    note = f"{bare} has no class names (class_names in dataset.json), so its numbers are the names"
    return classes, [note]


def folder_of(index: Index) -> str:
    """Return where the images of an index lie, for messages."""
    return index.origin


def check(frozen: Frozen) -> None:
    """Raise `DataError` for rows that are not finite, other widths, or fewer than two classes."""
    train, test = frozen.train, frozen.test
    for name, x in (("train", train.features), ("test", test.features)):
        broken = np.flatnonzero(~np.isfinite(x.sum(1, dtype=np.float64)))
        if len(broken):
            raise DataError(
                f"{len(broken)} {name} rows are not finite; the first is row {broken[0]}. "
                "Leave out the samples that extraction excluded (features/excluded.parquet)."
            )
    if train.features.shape[1] != test.features.shape[1]:
        raise DataError(
            f"training features have {train.features.shape[1]} columns and test features "
            f"{test.features.shape[1]}. Extract both with the same backbone."
        )
    if train.labels.min() == train.labels.max():
        raise DataError(
            f"all {len(train.labels)} training rows have label {frozen.classes[train.labels[0]]}: "
            "there is nothing to separate. Evaluate on shards with two classes or more."
        )


def _labels(
    split: str, x: Float[np.ndarray, "n d"], y: Int[np.ndarray, " n"] | None
) -> Int[np.ndarray, " n"]:
    """Return the labels of a split, or raise `DataError` with what is missing."""
    if y is None:
        raise DataError(f"the {split} shards have no labels, and evaluation needs them. {LABEL}")
    if len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"{split}: {len(x)} rows of features and {len(y)} labels. "
            "Evaluation needs one label for each row, and one row or more: extract them again."
        )
    missing = np.flatnonzero(y < 0)
    if len(missing):
        raise DataError(
            f"{len(missing)} of the {len(y)} {split} samples have no label; the first is row "
            f"{missing[0]}. {LABEL}"
        )
    return y
