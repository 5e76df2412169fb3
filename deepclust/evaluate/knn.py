"""Weighted nearest neighbours on frozen features: the probe that needs no training.

Wu et al. 2018 (arXiv 1805.01978), equation 10, with the protocol of DINO (`eval_knn.py`): cosine
similarity, 20 neighbours, each with the vote exp(similarity / 0.07). Unlike in DINO, similarities
are held for one tile of test x train rows at a time, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deepclust.clustering.points import in_range, unit_rows
from deepclust.evaluate.frozen import Frozen

TEST_ROWS = 512
TRAIN_ROWS = 16_384  # a tile of similarities is 32 MiB


def knn(
    frozen: Frozen, neighbours: int = 20, temperature: float = 0.07
) -> Iterator[tuple[str, float]]:
    """Yield ("top1", share of the test rows whose class wins the vote of their neighbours).

    With fewer than `neighbours` training rows all of them vote. Equal votes go to the lower class.
    """
    classes, numbers = np.unique(frozen.train.labels, return_inverse=True)
    train, targets = unit(frozen.train.features), torch.from_numpy(numbers.astype(np.int64))
    x, y = frozen.test.features, frozen.test.labels
    hits = 0
    for start in range(0, len(x), TEST_ROWS):
        stop = start + TEST_ROWS
        similarity, rows = nearest(unit(x[start:stop]), train, neighbours)
        votes = torch.zeros(len(rows), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, targets[rows], (similarity.double() / temperature).exp())
        hits += int((classes[votes.argmax(1).numpy()] == y[start:stop]).sum())
    yield "top1", hits / len(x)


def nearest(
    queries: Float[Tensor, "b d"], rows: Float[Tensor, "n d"], count: int
) -> tuple[Float[Tensor, "b c"], Int64[Tensor, "b c"]]:
    """Return inner products and row numbers of each query's `count` best rows, best first."""
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), TRAIN_ROWS):
        tile = queries @ rows[start : start + TRAIN_ROWS].T
        value, place = tile.topk(min(count, tile.shape[1]), dim=1)
        best, places = torch.cat([best, value], 1), torch.cat([places, place + start], 1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return best, places


def unit(x: Float[np.ndarray, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows in fp32 of length one, whatever their length was.

    A zero row stays zero, equally far from all.
    """
    rows = torch.from_numpy(np.array(x, np.float64 if x.dtype == np.float64 else np.float32))
    return unit_rows(in_range(rows).float() if rows.dtype == torch.float64 else rows)
