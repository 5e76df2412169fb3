"""Low-shot recognition: the linear probe on few labels of each class.

The ImageNet protocols of 1 % and 10 % of the labels (Chen et al., "A simple framework for
contrastive learning", 2020) fine-tune the network. Here it stays frozen, and the subset is drawn
by the seed: as many rows of every class, all of a class that has fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from deepclust.evaluate.frozen import Frozen, Skipped, Split, Value
from deepclust.evaluate.linear import linear
from deepclust.world import generator

FEWEST = 2  # of a class: one to fit on, one to hold out


def low_shot_1(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield the scores of the linear probe on 1 % of the training rows, see `low_shot`."""
    yield from low_shot(frozen, 0.01)


def low_shot_10(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield the scores of the linear probe on 10 % of the training rows, see `low_shot`."""
    yield from low_shot(frozen, 0.1)


def low_shot(frozen: Frozen, share: float) -> Iterator[tuple[str, Value]]:
    """Yield what `linear` does, and "labels", the count of training rows that it was fitted on.

    Raises `Skipped` where the share gives fewer than FEWEST rows of each class.
    """
    train = frozen.train
    classes = len(np.unique(train.labels))
    each = round(share * len(train.labels) / classes)
    if each < FEWEST:
        raise Skipped(
            f"{share:.0%} of {len(train.labels)} training rows are {each} of each of {classes} "
            f"classes, and {FEWEST} are needed. Evaluate on more images"
        )
    rows = balanced_rows(train.labels, each, frozen.seed)
    part = Split(train.features[rows], train.labels[rows], train.sample_ids[rows])
    yield from linear(replace(frozen, train=part))
    yield "labels", float(len(rows))


def balanced_rows(labels: Int64[np.ndarray, " n"], each: int, seed: int) -> Int64[np.ndarray, " m"]:
    """Return `each` rows of every class, or all of a class with fewer, in order."""
    shuffled = generator(seed, "evaluate", "low shot").permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by class, shuffled inside
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    places = np.arange(len(labels)) - np.repeat(starts, counts)
    rows: Int64[np.ndarray, " m"] = np.sort(order[places < each])
    return rows
