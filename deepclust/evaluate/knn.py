"""Weighted nearest neighbours on frozen features: the probe that needs no training.

Wu et al. 2018 (arXiv 1805.01978), equation 10, with the protocol of DINO (`eval_knn.py`): cosine
similarity, 20 neighbours, each with the vote exp(similarity / 0.07). Unlike DINO, similarities
are never held for more than a tile of test x train rows, so a million training rows fit anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

TEST_ROWS = 512
TRAIN_ROWS = 16_384  # a tile of similarities is 32 MiB


def knn(
    train_x: Float[np.ndarray, "n d"],
    train_y: Int[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_y: Int[np.ndarray, " m"],
    neighbours: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
) -> Iterator[tuple[str, float]]:
    """Yield ("top1", share of the test rows whose class wins the vote of their neighbours).

    With fewer than `neighbours` training rows all of them vote; equal votes go to the lower class.
    `seed` is there because every evaluator takes one; nothing here is random.
    """
    classes, targets = np.unique(train_y, return_inverse=True)
    train, votes_for = _unit(train_x), torch.from_numpy(targets.astype(np.int64))
    hits = 0
    for start in range(0, len(test_x), TEST_ROWS):
        stop = start + TEST_ROWS
        similarity, ids = nearest(_unit(test_x[start:stop]), train, neighbours)
        votes = torch.zeros(len(ids), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, votes_for[ids], (similarity.double() / temperature).exp())
        hits += int((classes[votes.argmax(1).numpy()] == test_y[start:stop]).sum())
    yield "top1", hits / len(test_x)


def nearest(
    queries: Float[Tensor, "b d"], rows: Float[Tensor, "n d"], count: int
) -> tuple[Float[Tensor, "b c"], Int64[Tensor, "b c"]]:
    """The inner products and ids of each query's `count` best rows, tile by tile, best first."""
    best = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), TRAIN_ROWS):
        tile = queries @ rows[start : start + TRAIN_ROWS].T
        value, place = tile.topk(min(count, tile.shape[1]), dim=1)
        best, ids = torch.cat([best, value], 1), torch.cat([ids, place + start], 1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, order)
    return best, ids


def _unit(x: Float[np.ndarray, "n d"]) -> Float[Tensor, "n d"]:
    """Rows in fp32 of length one; a zero row stays zero, so it is equally far from all."""
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(x, np.float32)))
