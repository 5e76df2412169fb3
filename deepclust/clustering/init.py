"""The start of k-means: distinct random rows, k-means++, given centroids, or old assignments.

FAISS draws k rows by index and may draw one value twice, and such a twin never wins a row. Here the
free centroids start on rows of distinct values. If there are too few, the error says how many.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from deepclust.clustering.options import Given, KMeansOptions
from deepclust.clustering.points import Points, Rows, as_tensor
from deepclust.errors import DataError, RecipeError
from deepclust.world import generator

SAMPLE = 32  # rows per cluster that k-means++ looks at; more cost time and change little


def start(
    points: Points, fixed: Float32[Tensor, "m d"], options: KMeansOptions, given: Given
) -> Float32[Tensor, "free d"]:
    """Return the free centroids that k-means begins with.

    Those that are drawn differ from every fixed centroid. Those that `given` holds, or the means
    of its assignments, may equal one.
    """
    free, seed = options.k - len(fixed), options.seed
    if given.assignments is not None:
        old = as_tensor(given.assignments).to(points.device, torch.int32)
        return from_assignments(points, free, fixed, old, seed)
    if given.centroids is not None:
        return from_centroids(points, free, len(fixed), given.centroids)
    if options.init == "k-means++":
        return plus_plus(points, free, fixed, seed)
    if options.init == "random":
        return distinct_rows(points, free, fixed, len(fixed), seed)
    raise RecipeError(
        f"init={options.init!r} is not known; use 'random', 'k-means++' or an array [k, d]"
    )


def distinct_rows(
    points: Points, count: int, taken: Float32[Tensor, "t d"], fixed: int, seed: int
) -> Float32[Tensor, "count d"]:
    """Return rows of `count` distinct values, none in `taken` (fixed ones first).

    Draws ever larger samples and keeps first occurrences. Raises `DataError` if all rows together
    have fewer values.
    """
    draws = generator(seed, "kmeans", "init")
    chosen, size = taken, max(count, 1024)
    while len(chosen) < len(taken) + count:
        ids = draws.choice(points.n, min(size, points.n), replace=False)
        rows = points.gather(torch.from_numpy(ids))
        chosen = _first_occurrences(torch.cat([chosen, rows]), len(taken))
        if size >= points.n and len(chosen) < len(taken) + count:
            raise DataError(too_few(points, len(taken) - fixed + count, taken[:fixed]))
        size *= 4
    return chosen[len(taken) : len(taken) + count]


def _first_occurrences(rows: Float32[Tensor, "n d"], keep: int) -> Float32[Tensor, "m d"]:
    """Return rows without those that equal an earlier one.

    The first `keep` stay in any case.
    """
    plain = (rows + 0.0).cpu().contiguous().numpy()  # + 0.0: -0.0 equals 0.0
    bytes_of = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1])))[:, 0]
    _, first = np.unique(bytes_of, return_index=True)
    places = np.union1d(first, np.arange(keep))
    return rows[torch.from_numpy(places).to(rows.device)]


def too_few(points: Points, free: int, fixed: Float32[Tensor, "m d"]) -> str:
    """Return the message for fewer distinct points than free clusters."""
    known = fixed
    for start in range(0, points.n, 65_536):
        ids = torch.arange(start, min(start + 65_536, points.n))
        known = _first_occurrences(torch.cat([known, points.gather(ids)]), len(fixed))
    distinct = len(known) - len(fixed)
    aside = " that differ from every fixed centroid" if len(fixed) else ""
    return (
        f"{free} clusters need {free} distinct feature rows, but {points.n} rows have only "
        f"{distinct}{aside}. Set cluster.k to at most {distinct + len(fixed)}, or look for "
        "duplicate images or a collapsed backbone."
    )


def from_centroids(points: Points, free: int, fixed: int, init: Rows) -> Float32[Tensor, "free d"]:
    """Return given centroids: [k, d], of which the first `fixed` are ignored, or [free, d]."""
    given = as_tensor(init).to(device=points.device, dtype=torch.float32)
    if given.ndim != 2 or given.shape[1] != points.dim or len(given) not in (free, free + fixed):
        raise RecipeError(
            f"init must have shape ({free + fixed}, {points.dim}), got {tuple(given.shape)}"
        )
    if not torch.isfinite(given).all():
        raise RecipeError("init has a row that is not finite")
    return given[len(given) - free :].clone()


def from_assignments(
    points: Points,
    free: int,
    fixed: Float32[Tensor, "m d"],
    old: Int32[Tensor, " n"],
    seed: int,
) -> Float32[Tensor, "free d"]:
    """Return means of the new rows of each old cluster, or a random start for one without.

    Old centroids are of no use, since the whitening turns and flips between rounds.

    Raises `RecipeError` for cluster ids of another length, or of k or more.
    """
    k = len(fixed) + free
    if old.shape != (points.n_local,) or points.count(old >= k):
        wanted = f"{points.n_local} ids below k={k} (-1: none)"
        raise RecipeError(f"labels must be {wanted} for a warm start")
    assignment = points.sum_clusters(old, k)
    means = (assignment.sums / assignment.mass.clamp(min=1e-300)[:, None]).float()[len(fixed) :]
    empty = (assignment.mass[len(fixed) :] == 0).nonzero().flatten()
    if len(empty):
        taken = torch.cat([fixed, means[assignment.mass[len(fixed) :] > 0]])
        means[empty] = distinct_rows(points, len(empty), taken, len(fixed), seed)
    return means


def plus_plus(
    points: Points, free: int, fixed: Float32[Tensor, "m d"], seed: int
) -> Float32[Tensor, "free d"]:
    """Start by k-means++ (Arthur and Vassilvitskii 2007) on 32 random rows per cluster.

    Each centroid is a row drawn with probability proportional to the squared distance to the
    nearest one so far, fixed ones included. When distinct rows run out, the rest start at random.
    """
    draws = generator(seed, "kmeans", "k-means++")
    count = min(points.n, SAMPLE * free)
    ids = draws.choice(points.n, count, replace=False, shuffle=False)
    sample = points.gather(torch.from_numpy(np.sort(ids)))
    nearest = torch.full((count,), torch.inf, device=sample.device)
    for row in fixed:
        nearest = torch.minimum(nearest, (sample - row).square().sum(1))
    chosen = [sample[int(draws.integers(count))]] if len(fixed) == 0 else []
    while len(chosen) < free:
        if chosen:
            nearest = torch.minimum(nearest, (sample - chosen[-1]).square().sum(1))
        heights = nearest.double().cpu().cumsum(0)  # on a GPU its last digits vary
        if heights[-1] <= 0:
            break
        aim = torch.tensor([draws.random()], dtype=torch.float64)
        place = torch.searchsorted(heights, aim * heights[-1], right=True)
        chosen.append(sample[int(place.clamp(max=count - 1))])
    drawn = torch.stack(chosen) if chosen else fixed[:0]
    taken = torch.cat([fixed, drawn])
    return torch.cat([drawn, distinct_rows(points, free - len(drawn), taken, len(fixed), seed)])
