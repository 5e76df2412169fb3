"""Do the classes come out of k-means by themselves? NMI, ARI and best-match accuracy.

The protocol of the deep-clustering papers: k = the number of classes, fitted on the training
features without labels, measured on the test features. The features go through the clustering step
of training, PCA-whitening to `dim` directions and L2 normalisation; only k differs.

k-means is restarted and the scores are means over the restarts. The usual choice, the restart of
the best inertia, is a lottery here: whitened features give ten starts inertias within 1 % of each
other and NMIs that differ by 0.1 (Fashion-MNIST), so one restart says little about the features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.statistics import accuracy, ari, nmi
from deepclust.clustering.whiten import Whitening
from deepclust.world import derive

SCORES = {"nmi": nmi, "ari": ari, "accuracy": accuracy}


def clusters(
    train_x: Float[np.ndarray, "n d"],
    train_y: Int[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_y: Int[np.ndarray, " m"],
    dim: int = 64,
    restarts: int = 10,
    seed: int = 0,
) -> Iterator[tuple[str, float]]:
    """Yield "nmi" (geometric), "ari" and "accuracy" (Hungarian matching) of the test rows.

    Means over the restarts. The training labels give nothing but their number of classes k.
    `dim`: directions kept by the whitening, a run's `cluster.dim`; at most d in any case.

    Raises what `kmeans` raises, as for fewer distinct rows than classes.
    """
    k = len(np.unique(train_y))
    whiten = Whitening.fit(train_x, min(dim, train_x.shape[1]))
    rows, probes = whiten(train_x), ArrayPoints(whiten(test_x))
    found = []
    for restart in range(restarts):
        start = derive(seed, "evaluate", "clusters", restart)
        fitted = kmeans(rows, k, seed=start, init="k-means++")
        found.append(probes.assign_to(torch.as_tensor(fitted.centroids)).cluster_ids.numpy())
    for name, score in SCORES.items():
        yield name, float(np.mean([score(labels, test_y) for labels in found]))
