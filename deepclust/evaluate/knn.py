"""Weighted nearest neighbours on frozen features: the probe that needs no training.

Wu et al. 2018 (arXiv 1805.01978), equation 10, with the protocol of DINO (`eval_knn.py`): cosine
similarity, 20 neighbours, each with the vote exp(similarity / 0.07). Unlike in DINO, similarities
are held for one tile of test x train rows at a time, so memory does not grow with their number.
Large work is done on a GPU where there is one (`device.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deepclust.clustering.points import in_range, unit_rows
from deepclust.clustering.precision import full_precision
from deepclust.evaluate.device import choose_device
from deepclust.evaluate.frozen import Frozen, Value
from deepclust.evaluate.interval import with_interval

TEST_ROWS = 512
TRAIN_ROWS = 16_384  # a tile of similarities is 32 MiB


def knn(
    frozen: Frozen, neighbours: int = 20, temperature: float = 0.07
) -> Iterator[tuple[str, Value]]:
    """Yield "top1", the share of the test rows whose class wins the vote of their neighbours.

    With fewer than `neighbours` training rows all of them vote. Equal votes go to the lower class.
    """
    classes, numbers = np.unique(frozen.train.labels, return_inverse=True)
    x, y = frozen.test.features, torch.from_numpy(frozen.test.labels.astype(np.int64))
    device = choose_device(frozen.train.features.size * len(x))
    train = rows_on(frozen.train.features, device)
    names, targets = (
        torch.from_numpy(part.astype(np.int64)).to(device) for part in (classes, numbers)
    )
    hits = np.zeros(len(x), bool)
    with full_precision():
        for start in range(0, len(x), TEST_ROWS):
            stop = start + TEST_ROWS
            similarity, rows = nearest(unit(x[start:stop]).to(device), train, neighbours)
            votes = torch.zeros(len(rows), len(classes), dtype=torch.float64, device=device)
            votes.scatter_add_(1, targets[rows], (similarity.double() / temperature).exp())
            hits[start:stop] = (names[votes.argmax(1)].cpu() == y[start:stop]).numpy()
    yield from with_interval("top1", hits, frozen.seed)


def nearest(
    queries: Float[Tensor, "b d"], rows: Float[Tensor, "n d"], count: int
) -> tuple[Float[Tensor, "b c"], Int64[Tensor, "b c"]]:
    """Return inner products and row numbers of each query's `count` best rows, best first."""
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(rows), TRAIN_ROWS):
        tile = queries @ rows[start : start + TRAIN_ROWS].T
        value, place = tile.topk(min(count, tile.shape[1]), dim=1)
        best, places = torch.cat([best, value], 1), torch.cat([places, place + start], 1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return best, places


def rows_on(x: Float[np.ndarray, "n d"], device: torch.device) -> Float[Tensor, "n d"]:
    """Return unit rows on the device, made and sent piece by piece, so that they exist once."""
    rows = torch.empty(x.shape, dtype=torch.float32, device=device)
    for start in range(0, len(x), TRAIN_ROWS):
        rows[start : start + TRAIN_ROWS] = unit(x[start : start + TRAIN_ROWS]).to(device)
    return rows


def unit(x: Float[np.ndarray, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows in fp32 of length one, whatever their length was.

    A zero row stays zero, equally far from all.
    """
    rows = torch.from_numpy(np.array(x, np.float64 if x.dtype == np.float64 else np.float32))
    return unit_rows(in_range(rows).float() if rows.dtype == torch.float64 else rows)
