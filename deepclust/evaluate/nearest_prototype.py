"""Nearest class prototype on frozen features: how much a few labels are worth.

This is the protocol of the labelled seed in training, without the clustering. Features go through
the whitening of the run: PCA to `dim` directions and L2 normalisation, fitted on all training
features without labels. The prototype of a class is the unit mean of its labelled rows. A test row
takes the class of the prototype with the largest cosine. With one label of each class it is
one-shot recognition, with all labels it is the nearest class mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from deepclust.clustering import class_prototypes
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.whiten import Whitening
from deepclust.errors import DataError
from deepclust.evaluate.frozen import Frozen, Skipped, Value
from deepclust.evaluate.interval import with_interval


def prototypes(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield "top1" and "recall" (the mean over the test rows' classes) of the nearest prototype.

    A test row of a class without a labelled seed counts as wrong.

    Raises `Skipped` without seeds, `DataError` when no training row is a seed, `NumericalError`
    for a class whose rows cancel.
    """
    train, test, seeds = frozen.train, frozen.test, frozen.seeds
    if seeds is None:
        raise Skipped(frozen.seeds_missing)
    if len(seeds.rows) == 0:
        raise DataError("prototypes: no training row has a label. Give at least one a class.")
    known, classes = np.unique(seeds.labels, return_inverse=True)
    whiten = Whitening.fit(train.features, min(frozen.dim, train.features.shape[1]))
    labelled = ArrayPoints(whiten(train.features[seeds.rows]))
    names = [frozen.classes[label] for label in known]
    centres = class_prototypes.class_prototypes(labelled, classes.astype(np.int32), names)
    if seeds.refine > 0:
        points = ArrayPoints(whiten(train.features))
        centres = class_prototypes.refine(points, centres, seeds.refine)
    points = ArrayPoints(whiten(test.features))
    nearest = points.assign_to(torch.from_numpy(centres.rows)).cluster_ids.numpy()
    right = known[nearest] == test.labels
    yield from with_interval("top1", right, frozen.seed)
    _, targets = np.unique(test.labels, return_inverse=True)
    recalls = np.bincount(targets, weights=right) / np.bincount(targets)
    yield "recall", float(recalls.mean())
