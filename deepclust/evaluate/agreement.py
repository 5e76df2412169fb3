"""What features agree on without any label: two crops of an image, two networks, two rounds.

A network that has learnt what an image shows gives its crops similar features, and others to other
images. Each function returns what each image scores, for a bootstrap over images, or one number of
what pairs of different images reach.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from deepclust.clustering.match_ids import match
from deepclust.clustering.precision import full_precision
from deepclust.errors import DataError
from deepclust.evaluate.knn import nearest, unit

NEIGHBOURS = 10
TILE = 512  # images whose similarities to all are in memory


def cosines(
    one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "n d"]
) -> Float64[np.ndarray, " n"]:
    """Return the cosine of each image's two rows."""
    values: Float64[np.ndarray, " n"] = (unit(one) * unit(other)).sum(1).double().numpy()
    return values


def others_cosine(one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "n d"]) -> float:
    """Return the mean cosine over all pairs of rows of different images."""
    a, b = unit(one).double(), unit(other).double()
    total = float(a.sum(0) @ b.sum(0)) - float((a * b).sum())
    return total / (len(a) * (len(a) - 1))


def finds_other_crop(
    one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "n d"]
) -> Bool[np.ndarray, " n"]:
    """Return whether the nearest second crop of each first crop shows the same image."""
    places = _neighbours(unit(one), unit(other), 1)[:, 0]
    return np.asarray((places == torch.arange(len(one))).numpy())


def others_together(one: Int[np.ndarray, " n"], other: Int[np.ndarray, " n"]) -> float:
    """Return the share of pairs of different images whose crops have one cluster."""
    n, k = len(one), int(max(one.max(), other.max())) + 1
    both = np.bincount(one, minlength=k) @ np.bincount(other, minlength=k)
    return float(both - (one == other).sum()) / (n * (n - 1))


def shared_neighbours(
    one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "n e"], count: int = NEIGHBOURS
) -> Float64[np.ndarray, " n"]:
    """Return the share of each image's `count` nearest images that two networks have in common.

    An image does not count among these. Raises `DataError` for fewer than `count` + 2 images.
    """
    if len(one) < count + 2:
        raise DataError(f"{len(one)} images are too few for {count} neighbours of each")
    a, b = (_without_self(unit(rows), count) for rows in (one, other))
    shared = (a[:, :, None] == b[:, None]).any(2).double().mean(1)
    values: Float64[np.ndarray, " n"] = shared.numpy()
    return values


def keeps_cluster(
    before: Int[np.ndarray, " n"], now: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " m"]:
    """Return whether each image in both clusterings stayed, ids matched by their overlap.

    An id of -1 is of an excluded image. Raises `DataError` where no image is in both.
    """
    both = (before >= 0) & (now >= 0)
    if not both.any():
        raise DataError("no image has a cluster in both rounds")
    before, now = before[both], now[both]
    matching = match(before, now, int(max(before.max(), now.max())) + 1)
    return np.asarray(matching.new_ids[now] == before)


def _without_self(rows: Tensor, count: int) -> Tensor:
    """Return the numbers [n, count] of the nearest rows of each row but itself."""
    places = _neighbours(rows, rows, count + 1)
    own = places == torch.arange(len(rows))[:, None]
    own[:, -1] |= ~own.any(1)  # equal rows may have taken its place
    return places[~own].reshape(len(rows), count)


def _neighbours(queries: Tensor, rows: Tensor, count: int) -> Tensor:
    with full_precision():
        parts = [nearest(part, rows, count)[1] for part in torch.split(queries, TILE)]
    return torch.cat(parts)
