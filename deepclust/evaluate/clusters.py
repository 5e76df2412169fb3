"""Do the classes come out of k-means by themselves? NMI, ARI and best-match accuracy.

The protocol of the deep-clustering papers: k = the number of classes, fitted on the training
features without labels, measured on the test features. The features go through PCA-whitening and L2
normalisation as in training, but to k directions; k-means is restarted, the best inertia counts.

Why k: the centroids of k clusters span at most k - 1 directions, and the principal ones are the
continuous solution of k-means' cluster indicators (Ding & He, "K-means clustering via principal
component analysis", ICML 2004). Whitening gives every direction the same weight, so each further
one is noise at full weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int

from deepclust.clustering.assignments import accuracy, ari, nmi
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.points import ArrayPoints
from deepclust.clustering.whiten import Whitening
from deepclust.world import derive


def clusters(
    train_x: Float[np.ndarray, "n d"],
    train_y: Int[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_y: Int[np.ndarray, " m"],
    dim: int | None = None,
    restarts: int = 5,
    seed: int = 0,
) -> Iterator[tuple[str, float]]:
    """Yield "nmi" (geometric), "ari" and "accuracy" (Hungarian matching) of the test rows.

    The training labels give nothing but their number of classes k. `dim`: directions kept by the
    whitening, by default k (see above); at most d in any case.

    Raises what `kmeans` raises, as for fewer distinct rows than classes.
    """
    k = len(np.unique(train_y))
    whiten = Whitening.fit(train_x, min(dim or k, train_x.shape[1]))
    rows = whiten(train_x)
    seeds = [derive(seed, "evaluate", "clusters", restart) for restart in range(restarts)]
    best = min((kmeans(rows, k, seed=one) for one in seeds), key=lambda found: found.inertia)
    found = ArrayPoints(whiten(test_x)).visit(torch.as_tensor(best.centroids)).labels.numpy()
    yield "nmi", nmi(found, test_y)
    yield "ari", ari(found, test_y)
    yield "accuracy", accuracy(found, test_y)
