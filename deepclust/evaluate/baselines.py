"""What scores are compared with: the commonest class, pixels, and a network with random weights.

A score that one of these reaches too says nothing about pretraining. Pixels are those that the
network sees, averaged to at most SIDE x SIDE places. Pixels and random weights are measured on at
most MOST_ROWS images of each split, drawn by the seed. So their cost is bounded: one more pass over
these images. More training rows would make them a little better, so their number is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
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
COMPARED = ("knn", "linear", "clusters", "spherical_clusters")  # the evaluators of baselines


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

    parts = [_drawn(split, frozen.seed) for split in (frozen.train, frozen.test)]
    rows = [
        embed_samples(both, index, data, part.sample_ids)[0]
        for index, part in zip(indexes, parts, strict=True)
    ]
    columns = {RANDOM: slice(0, widths[0]), PIXELS: slice(widths[0], None)}
    return {
        name: _measured(frozen, parts, [x[:, columns[name]] for x in rows])
        for name in (PIXELS, RANDOM)
    }


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


def _drawn(split: Split, seed: int) -> Split:
    """Return at most MOST_ROWS labelled samples of a split, in order, without their features."""
    rows = np.arange(len(split.labels))
    if len(rows) > MOST_ROWS:
        random = generator(seed, "evaluate", "baselines")
        rows = np.sort(random.choice(rows, MOST_ROWS, replace=False))
    return Split(np.zeros((len(rows), 0), np.float32), split.labels[rows], split.sample_ids[rows])


def _measured(frozen: Frozen, parts: list[Split], rows: list[Float[np.ndarray, "n d"]]) -> Frozen:
    train, test = (replace(part, features=x) for part, x in zip(parts, rows, strict=True))
    return Frozen(frozen.classes, train, test, dim=frozen.dim, seed=frozen.seed)
