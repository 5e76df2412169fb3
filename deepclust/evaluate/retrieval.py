"""Image retrieval: whether the images nearest to a test image, by cosine, are of its class.

Mean average precision, each test row a query and the training rows the gallery. Average precision
is that of scikit-learn: rows of the same similarity come in together, so their order is nothing.
The similarities of a few queries to all rows exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from deepclust.clustering.precision import full_precision
from deepclust.evaluate.device import choose_device
from deepclust.evaluate.frozen import Frozen, Value
from deepclust.evaluate.interval import with_interval
from deepclust.evaluate.knn import rows_on, unit
from deepclust.world import generator

MOST_QUERIES = 1_000  # a ranking of all training rows is sorted for each
TILE = 2**23  # similarities held at a time


def retrieval(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield "map", the mean average precision of at most MOST_QUERIES test rows, and "queries".

    The queries are drawn by the seed where there are more. One of a class without a training row
    has precision 0.
    """
    train, test = frozen.train, frozen.test
    queries = np.arange(len(test.labels))
    if len(queries) > MOST_QUERIES:
        random = generator(frozen.seed, "evaluate", "retrieval")
        queries = np.sort(random.choice(queries, MOST_QUERIES, replace=False))
    device = choose_device(train.features.size * len(queries))
    gallery, classes = rows_on(train.features, device), torch.from_numpy(train.labels).to(device)
    size, each = max(1, TILE // len(gallery)), []
    with full_precision():
        for start in range(0, len(queries), size):
            rows = queries[start : start + size]
            similar = unit(test.features[rows]).to(device) @ gallery.T
            right = torch.from_numpy(test.labels[rows]).to(device)[:, None] == classes
            each.append(average_precision(similar, right).cpu().numpy())
    yield from with_interval("map", np.concatenate(each), frozen.seed)
    yield "queries", float(len(queries))


def average_precision(
    scores: Float[Tensor, "q n"], right: Bool[Tensor, "q n"]
) -> Float64[Tensor, " q"]:
    """Return the sum of precisions at the right rows over their number, 0 where there are none."""
    ranked, order = scores.sort(dim=1, descending=True)
    hits = right.gather(1, order)
    falling = (-ranked).contiguous()
    last = torch.searchsorted(falling, falling, right=True)  # the rank that ends a run of equals
    precision = hits.cumsum(1).gather(1, last - 1).double() / last
    return (precision * hits).sum(1) / hits.sum(1).clamp(min=1)
