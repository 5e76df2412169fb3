"""How far do a few labels reach? The nearest class prototype decides, on frozen features.

The protocol of the labelled seed in training, without the clustering: features go through the
whitening of the run (PCA to `dim` directions, L2 normalisation, fitted on all training features
without labels), a class's prototype is the unit mean of its labelled rows, and a test row takes
the class of the prototype with the largest cosine. With one label a class it is one-shot
recognition; with all labels it is the nearest class mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Integer

from deepclust.clustering import class_prototypes as of_classes
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.whiten import Whitening
from deepclust.errors import DataError


def prototypes(
    train_x: Float[np.ndarray, "n d"],
    seed_rows: Integer[np.ndarray, " s"],
    seed_labels: Int[np.ndarray, " s"],
    test_x: Float[np.ndarray, "m d"],
    test_y: Int[np.ndarray, " m"],
    dim: int = 64,
    refine: float = 0.0,
) -> Iterator[tuple[str, float]]:
    """Yield "top1" and "recall" (the mean over the test rows' classes) of the nearest prototype.

    `seed_rows` are the labelled rows of `train_x`, `seed_labels` their classes. A test row of a
    class without a label counts as wrong. `dim`: directions kept by the whitening, a run's
    `cluster.dim`; at most d in any case. `refine`: a run's `seeds.refine`, by all training rows.

    Raises `DataError` without labelled rows, `NumericalError` for a class whose rows cancel.
    """
    if len(seed_rows) == 0:
        raise DataError("prototypes: no training row has a label. Give at least one a class.")
    known, classes = np.unique(seed_labels, return_inverse=True)
    whiten = Whitening.fit(train_x, min(dim, train_x.shape[1]))
    labelled = ArrayPoints(whiten(train_x[seed_rows]))
    names = [str(label) for label in known]
    found = of_classes.class_prototypes(labelled, classes.astype(np.int32), names)
    if refine > 0:
        found = of_classes.refine(ArrayPoints(whiten(train_x)), found, refine)
    nearest = (
        ArrayPoints(whiten(test_x)).assign_to(torch.from_numpy(found.rows)).cluster_ids.numpy()
    )
    right = known[nearest] == test_y
    yield "top1", float(right.mean())
    _, targets = np.unique(test_y, return_inverse=True)
    recalls = np.bincount(targets, weights=right) / np.bincount(targets)
    yield "recall", float(recalls.mean())
