"""The start of k-means: distinct random rows, k-means++, given centroids, or old assignments.

FAISS draws k rows by index and may draw one value twice, and such a twin never wins a row. Here the
free centroids start on rows of distinct values. If there are too few, the error says how many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from deepclust.clustering.exact_sums import grid_of, on_grid
from deepclust.clustering.options import Given, KMeansOptions
from deepclust.clustering.points import Points, Rows, as_tensor
from deepclust.copies import sent
from deepclust.errors import DataError, RecipeError
from deepclust.world import generator

TINY = 1e-300  # a weight beside the largest one, so that nothing is divided by 0
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
        old = as_tensor(given.assignments).to(points.device)
        _check_old(points, old, options.k)
        return from_assignments(points, free, fixed, old.to(torch.int32), seed)
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

    Draws ever larger samples, by weight, and keeps first occurrences. Raises `DataError` if all
    rows together have fewer values.
    """
    draws = generator(seed, "kmeans", "init")
    rows = _Weighted.of(points)
    chosen, size = taken, max(count, 1024)
    while len(chosen) < len(taken) + count:
        ids = rows.draw(draws, min(size, rows.count))
        chosen = torch.cat([chosen, points.gather(torch.from_numpy(ids))])
        chosen = _first_occurrences(chosen, len(taken))
        if size >= rows.count and len(chosen) < len(taken) + count:
            raise DataError(too_few(points, len(taken) - fixed + count, taken[:fixed]))
        size *= 4
    return chosen[len(taken) : len(taken) + count]


@dataclass(frozen=True)
class _Weighted:
    """The rows that a start is drawn from: those that weigh more than nothing, by weight."""

    count: int
    ids: Int64[np.ndarray, " count"] | None  # None: all rows
    weights: Float64[np.ndarray, " count"] | None  # None: all equal

    @classmethod
    def of(cls, points: Points) -> _Weighted:
        """Return the rows of `points`; equal weights are none, and change no draw."""
        weights = points.list_weights()
        if weights is None or (points.n and weights.min() == weights.max()):
            return cls(points.n, None, None)
        ids = np.flatnonzero(weights)
        return cls(len(ids), ids, np.maximum(weights[ids] / weights.max(), TINY))

    def draw(self, draws: np.random.Generator, size: int) -> Int64[np.ndarray, " size"]:
        """Draw different rows, one after the other, each with a chance as its weight."""
        if self.ids is None or self.weights is None:
            return draws.choice(self.count, size, replace=False)
        # the smallest of exponential times at rates as the weights (Efraimidis and Spirakis 2006)
        times = draws.standard_exponential(self.count) / self.weights
        return self.ids[np.argsort(times, kind="stable")[:size]]


def _first_occurrences(rows: Float32[Tensor, "n d"], keep: int) -> Float32[Tensor, "m d"]:
    """Return rows without those that equal an earlier one.

    The first `keep` stay in any case.
    """
    plain = (rows + 0.0).cpu().contiguous().numpy()  # + 0.0: -0.0 equals 0.0
    bytes_of = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1])))[:, 0]
    _, first = np.unique(bytes_of, return_index=True)
    places = np.union1d(first, np.arange(keep))
    return rows[sent(torch.from_numpy(places), rows.device)]


def too_few(points: Points, free: int, fixed: Float32[Tensor, "m d"]) -> str:
    """Return the message for fewer distinct points than free clusters."""
    known, rows = fixed, _Weighted.of(points)
    ids = torch.arange(points.n) if rows.ids is None else torch.from_numpy(rows.ids)
    for part in torch.split(ids, 65_536):
        known = _first_occurrences(torch.cat([known, points.gather(part)]), len(fixed))
    distinct = len(known) - len(fixed)
    weighted = "" if rows.ids is None else " of a weight above 0"
    aside = " that differ from every fixed centroid" if len(fixed) else ""
    cause = "duplicate images or a collapsed backbone"
    if points.dim == 1:
        cause = "rows of more than one dimension"
    return (
        f"{free} clusters need {free} distinct feature rows, but {rows.count} rows{weighted} have "
        f"only {distinct}{aside}. Set cluster.k to at most {distinct + len(fixed)}, or look for "
        f"{cause}."
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


def _check_old(points: Points, old: Tensor, k: int) -> None:
    """Raise `RecipeError` for old cluster ids of another length or type, or of k or more."""
    whole = not (old.is_floating_point() or old.dtype == torch.bool)
    if not whole or old.shape != (points.n_local,) or points.count((old >= k) | (old < -1)):
        wanted = f"{points.n_local} integers below k={k} (-1: none)"
        raise RecipeError(f"labels must be {wanted} for a warm start")


def from_assignments(
    points: Points,
    free: int,
    fixed: Float32[Tensor, "m d"],
    old: Int32[Tensor, " n"],
    seed: int,
) -> Float32[Tensor, "free d"]:
    """Return means of the new rows of each old cluster, or a random start for one without.

    Old centroids are of no use, since the whitening turns and flips between rounds.
    """
    k = len(fixed) + free
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

    Each centroid is a row drawn with probability proportional to its weight times the squared
    distance to the nearest one so far, fixed ones included. When distinct rows run out, the rest
    start at random.
    """
    draws = generator(seed, "kmeans", "k-means++")
    sample, weights = _sample(points, SAMPLE * free, draws)
    count = len(sample)
    nearest = torch.full((count,), torch.inf, device=sample.device)
    for row in fixed:
        nearest = torch.minimum(nearest, (sample - row).square().sum(1))
    first = [] if len(fixed) else [sample[_pick_first(count, weights, draws)]]
    draw = _draw_here if sample.device.type == "cpu" else _draw_there
    chosen = draw(sample, weights, nearest, first, free, draws)
    drawn = torch.stack(chosen) if chosen else fixed[:0]
    taken = torch.cat([fixed, drawn])
    return torch.cat([drawn, distinct_rows(points, free - len(drawn), taken, len(fixed), seed)])


def _draw_here(
    sample: Float32[Tensor, "s d"],
    weights: Float64[Tensor, " s"] | None,
    nearest: Float32[Tensor, " s"],
    chosen: list[Tensor],
    free: int,
    draws: np.random.Generator,
) -> list[Tensor]:
    """Return `free` rows, or fewer where all rows are at a chosen one; on a CPU."""
    while len(chosen) < free:
        if chosen:
            nearest = torch.minimum(nearest, (sample - chosen[-1]).square().sum(1))
        heights = nearest.double()
        heights = (heights if weights is None else heights * weights).cumsum(0)
        if heights[-1] <= 0:
            break
        chosen.append(sample[_pick(heights, draws)])
    return chosen


def _draw_there(
    sample: Float32[Tensor, "s d"],
    weights: Float64[Tensor, " s"] | None,
    nearest: Float32[Tensor, " s"],
    chosen: list[Tensor],
    free: int,
    draws: np.random.Generator,
) -> list[Tensor]:
    """Return the same on a GPU, which is not waited for between two rows.

    The last digits of a sum vary there, so heights are rounded to a grid on which sums are exact
    (`exact_sums.py`). Whether rows have run out is asked at the end.
    """
    wide = None if weights is None else weights.to(sample.device)
    most = float(nearest.max()) if len(nearest) else 0.0
    if not np.isfinite(most):  # no fixed centroid: two rows are at most two lengths apart
        most = 4 * float(sample.double().square().sum(1).max())
    grid = grid_of(most, len(sample))
    totals: list[Tensor] = []
    start = len(chosen)
    while len(chosen) < free:
        if chosen:
            nearest = torch.minimum(nearest, (sample - chosen[-1]).square().sum(1))
        heights = nearest.double() if wide is None else nearest.double() * wide
        heights = on_grid(heights, grid).cumsum(0)
        place = torch.searchsorted(heights, heights[-1:] * draws.random(), right=True)
        totals.append(heights[-1])
        chosen.append(sample.index_select(0, place.clamp(max=len(sample) - 1))[0])
    empty = (torch.stack(totals) <= 0).nonzero().flatten().tolist() if totals else []
    return chosen[: start + empty[0]] if empty else chosen


def _sample(
    points: Points, most: int, draws: np.random.Generator
) -> tuple[Float32[Tensor, "s d"], Float64[Tensor, " s"] | None]:
    """Return the rows that k-means++ looks at, and their weights unless these are equal.

    More weighted rows than `most` are drawn with replacement by weight. Then all count the same.
    """
    rows = _Weighted.of(points)
    if rows.ids is None or rows.weights is None:
        count = min(points.n, most)
        ids = draws.choice(points.n, count, replace=False, shuffle=False)
        return points.gather(torch.from_numpy(np.sort(ids))), None
    if rows.count <= most:
        return points.gather(torch.from_numpy(rows.ids)), torch.from_numpy(rows.weights)
    share = rows.weights / rows.weights.sum()
    ids = rows.ids[np.sort(draws.choice(rows.count, most, p=share))]
    return points.gather(torch.from_numpy(ids)), None


def _pick_first(
    count: int, weights: Float64[Tensor, " s"] | None, draws: np.random.Generator
) -> int:
    """Draw a place by weight."""
    return int(draws.integers(count)) if weights is None else _pick(weights.cumsum(0), draws)


def _pick(heights: Float64[Tensor, " s"], draws: np.random.Generator) -> int:
    """Draw a place with a chance as its step in the cumulated `heights`."""
    aim = torch.tensor([draws.random()], dtype=torch.float64)
    place = torch.searchsorted(heights, aim * heights[-1], right=True)
    return int(place.clamp(max=len(heights) - 1))
