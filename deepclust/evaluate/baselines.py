"""What scores are compared with: the commonest class, pixels, and a network with random weights.

A score that one of these reaches too says nothing about pretraining. Pixels are those that the
network sees, averaged to at most SIDE x SIDE places. Pixels and random weights are measured on at
most MOST_ROWS images of each split, drawn by the seed. So their cost is bounded: one more pass over
these images. Where that is a part, the network is scored on the same images again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from deepclust.data.shards.index import Index
from deepclust.evaluate.frozen import Embed, Frozen, Split, Value, embed_samples
from deepclust.evaluate.interval import with_interval
from deepclust.recipe.sections import Data
from deepclust.world import generator

MOST_ROWS = 10_000
SIDE = 32
PIXELS, RANDOM = "pixels", "random_weights"
OWN = "this_network"  # on the rows of the baselines, where these are fewer
COMPARED = (
    "knn",
    "linear",
    "clusters",
    "spherical_clusters",
    "multi_label",
)  # the evaluators of baselines


def majority(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield "top1" of answering the commonest training class always (of equal ones the lowest)."""
    commonest = np.bincount(frozen.train.labels).argmax()
    yield from with_interval("top1", frozen.test.labels == commonest, frozen.seed)


def compared(names: Iterable[str]) -> list[str]:
    """Return those of some evaluators that baselines are measured by."""
    return [name for name in names if name in COMPARED]


def freeze_baselines(
    frozen: Frozen, indexes: tuple[Index, Index], data: Data, fresh: Embed
) -> dict[str, Frozen]:
    """Return what evaluators measure of "pixels" and "random_weights", from one pass over images.

    `indexes` are those that `frozen` was made from, and `fresh` is the network before training.
    """
    widths: list[int] = []

    def both(images: UInt8[Tensor, "b 3 s s"]) -> Float32[Tensor, "b d"]:
        own = fresh(images).cpu()
        widths.append(own.shape[1])
        return torch.cat([own, pixels(images)], 1)

    sample = remeasured(frozen, indexes, data, both)
    columns = {PIXELS: slice(widths[0], None), RANDOM: slice(0, widths[0])}
    return {name: _columns(sample, part) for name, part in columns.items()}


def remeasured(
    frozen: Frozen, indexes: tuple[Index, Index], data: Data, embed: Embed, most: int | None = None
) -> Frozen:
    """Return the same labelled images with other features, at most `most` of each split.

    They are drawn by the seed. The default is MOST_ROWS.
    """
    train, test = (
        _embedded(_drawn(split, frozen.seed, most or MOST_ROWS), index, data, embed)
        for split, index in zip((frozen.train, frozen.test), indexes, strict=True)
    )
    return Frozen(frozen.classes, train, test, dim=frozen.dim, seed=frozen.seed)


def pixels(images: UInt8[Tensor, "b 3 s s"]) -> Float32[Tensor, "b d"]:
    """Return images as rows of at most 3 x SIDE x SIDE numbers in [0, 255], means over places."""
    side = min(SIDE, images.shape[-1])
    return adaptive_avg_pool2d(images.cpu().float(), side).flatten(1)


def rows_of(frozen: Frozen) -> dict[str, float]:
    """Return the counts of training and test rows that baselines are measured on."""
    return {
        name: float(min(MOST_ROWS, len(split.labels)))
        for name, split in (("train", frozen.train), ("test", frozen.test))
    }


def same_rows(frozen: Frozen) -> Frozen | None:
    """Return the network's own features of the images that baselines are measured on.

    None where these are all: then its scores are comparable as they are. With more training rows
    any features would look better beside baselines.
    """
    if max(len(frozen.train.labels), len(frozen.test.labels)) <= MOST_ROWS:
        return None
    train, test = (_taken(split, frozen.seed, MOST_ROWS) for split in (frozen.train, frozen.test))
    return replace(frozen, train=train, test=test)


def _drawn(split: Split, seed: int, most: int) -> Split:
    """Return at most `most` labelled samples of a split, in order, without their features."""
    return _taken(replace(split, features=np.zeros((len(split.labels), 0), np.float32)), seed, most)


def _taken(split: Split, seed: int, most: int) -> Split:
    """Return at most `most` samples of a split, drawn by the seed, in order."""
    rows = np.arange(len(split.labels))
    if len(rows) > most:
        random = generator(seed, "evaluate", "baselines")
        rows = np.sort(random.choice(rows, most, replace=False))
    return Split(split.features[rows], split.labels[rows], split.sample_ids[rows])


def _embedded(split: Split, index: Index, data: Data, embed: Embed) -> Split:
    return replace(split, features=embed_samples(embed, index, data, split.sample_ids)[0])


def _columns(frozen: Frozen, part: slice) -> Frozen:
    train, test = (
        replace(split, features=split.features[:, part]) for split in (frozen.train, frozen.test)
    )
    return replace(frozen, train=train, test=test)
