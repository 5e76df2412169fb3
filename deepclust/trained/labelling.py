"""Which cluster a row is in, by a finished round or by a method's own answers: one rule each.

A rule says of every row its cluster, the distance to it, the second-best cluster, and by how much
that is worse. It is asked tile by tile, so its memory does not grow with the rows.

- `Nearest`: the nearest centroid, as k-means assigns (`clustering/nearest.py`, exact). In two
  levels that of the nearest super-cluster.
- `Balanced`: the largest of a head's probabilities times the scalings of the clusters (SeLa). The
  distance is -log p.
- `Answers`: the largest logit. The distance is -log p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering.nearest import squared_distances
from deepclust.clustering.points import unit_rows
from deepclust.clustering.precision import full_precision
from deepclust.clustering.search import SEARCHES
from deepclust.clustering.whiten import Whitening
from deepclust.run.directory import Run, has_file
from deepclust.run.round_files import find_whitening, read_array

CELLS = 2**22  # scores of a tile, 16 MB


@dataclass(frozen=True)
class Labels:
    """The clusters of some rows.

    `distances`: squared L2 to the own centroid, or -log p. `margins`: by how much the second-best
    cluster is farther. In two levels that of another super-cluster may be nearer, and below 0.
    """

    clusters: Int32[np.ndarray, " m"]
    distances: Float32[np.ndarray, " m"]
    seconds: Int32[np.ndarray, " m"]  # -1 where there is one cluster only
    margins: Float32[np.ndarray, " m"]  # NaN there

    @classmethod
    def joined(cls, parts: list[Labels]) -> Labels:
        """Return the labels of all parts, one after the other."""
        names = ("clusters", "distances", "seconds", "margins")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Rule(Protocol):
    """What tells the clusters of rows, once for each head."""

    @property
    def heads(self) -> int:
        """The number of clusterings."""

    @property
    def k(self) -> int:
        """The number of clusters of each."""

    def tiles(self, parts: Iterator[Float32[Tensor, "m d"]], head: int) -> Iterator[Labels]:
        """Yield the labels of each tile of rows."""


def label(rule: Rule, rows: np.ndarray | Tensor, head: int = 0) -> Labels:
    """Return the labels of rows [n, d], which may be memory-mapped."""
    step = max(1, CELLS // rule.k)
    with torch.inference_mode(), full_precision():
        parts = list(rule.tiles(_tiles(rows, step), head))
    return Labels.joined(parts)


def _tiles(rows: np.ndarray | Tensor, step: int) -> Iterator[Float32[Tensor, "m d"]]:
    for start in range(0, max(1, len(rows)), step):
        part = rows[start : start + step]
        yield part.float() if isinstance(part, Tensor) else torch.from_numpy(np.array(part)).float()


@dataclass(frozen=True)
class Projection:
    """Features of a network to rows of a round, with the roundings of its extraction."""

    pivot: Float32[np.ndarray, " D"] | None
    whitening: Whitening | None
    unit: bool

    def __call__(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b d"]:
        """Return the rows of float16 numbers that the round would have of these features."""
        pivot = 0 if self.pivot is None else torch.from_numpy(self.pivot).to(features.device)
        raw = (features.float() - pivot).half().float() + pivot
        if self.whitening is not None:
            return self.whitening(raw.cpu()).half()
        return (unit_rows(raw) if self.unit else raw).half()


def projection_of(run: Run, number: int) -> Projection:
    """Return how a round's rows are made of features.

    Older runs kept no pivot. The mean of their features is near it, and rounds nearly alike.
    """
    round_dir, refresh = run.round(number), run.recipe.method.round
    assert refresh is not None
    whitening, pivot = find_whitening(round_dir), None
    if has_file(round_dir / "centroids", "pivot.npy"):
        pivot = np.array(read_array(round_dir / "centroids", "pivot.npy"))
    elif whitening is not None:
        pivot = whitening.mean.astype(np.float32)
    return Projection(pivot, whitening, refresh.unit)


def rule_of(run: Run, number: int) -> Rule:
    """Return the rule of a finished round."""
    stage = run.round(number) / "centroids"
    refresh = run.recipe.method.round
    assert refresh is not None
    if has_file(stage, "scalings.npy"):
        parts = (np.array(read_array(stage, f"{name}.npy")) for name in BALANCED)
        weight, bias, scalings = (torch.from_numpy(part) for part in parts)
        return Balanced(weight, bias, scalings, refresh.sharpness)
    centroids = torch.from_numpy(np.array(read_array(stage, "centroids.npy", dims=3)))
    supers = None
    if has_file(stage, "super_centroids.npy"):
        supers = torch.from_numpy(np.array(read_array(stage, "super_centroids.npy")))
        supers = supers[None] if supers.ndim == 2 else supers
    return Nearest(centroids, supers, refresh.spherical or has_file(stage, "prototypes.npy"))


BALANCED = ("weight", "bias", "scalings")


@dataclass(frozen=True)
class Nearest:
    """The nearest centroid; in two levels the nearest of those in the nearest super-cluster."""

    centroids: Float32[Tensor, "heads k d"]
    supers: Float32[Tensor, "heads s d"] | None = None
    spherical: bool = False  # of the first level

    @property
    def heads(self) -> int:
        """The number of clusterings."""
        return len(self.centroids)

    @property
    def k(self) -> int:
        """The number of clusters of each."""
        return self.centroids.shape[1]

    def tiles(self, parts: Iterator[Float32[Tensor, "m d"]], head: int) -> Iterator[Labels]:
        """Yield the labels of each tile of rows."""
        centroids, distances = self.centroids[head], Distances(self.centroids[head])
        search = SEARCHES["torch"](centroids if self.supers is None else self.supers[head])
        empty = self._empty(head)
        for rows in parts:
            scaled = unit_rows(rows) if self.spherical else rows
            ids = search(scaled)
            if self.supers is None:
                rows = scaled
            else:
                ids = self._in_two_levels(rows, ids, head)
            own = squared_distances(rows, centroids, ids)
            second = _second(distances(rows).masked_fill_(empty, torch.inf), ids)
            margins = squared_distances(rows, centroids, second.clamp(min=0)) - own
            yield _labels(ids, own, second, margins)

    def _in_two_levels(
        self, rows: Float32[Tensor, "m d"], nearest: Int64[Tensor, " m"], head: int
    ) -> Int64[Tensor, " m"]:
        """Return each row's nearest centroid in its super-cluster."""
        assert self.supers is not None
        each, ids = self.k // self.supers.shape[1], torch.zeros_like(nearest)
        used = ~self._empty(head)
        for s in np.unique(nearest.numpy()).tolist():
            mine = (nearest == s).nonzero().flatten()
            inside = self.centroids[head, s * each : (s + 1) * each]
            inside = inside[: max(1, int(used[s * each : (s + 1) * each].sum()))]
            ids[mine] = s * each + SEARCHES["torch"](inside)(rows[mine])
        return ids

    def _empty(self, head: int) -> Tensor:
        """Return which clusters are empty ids of a small super-cluster: their rows are zeros."""
        if self.supers is None:
            return torch.zeros(self.k, dtype=torch.bool)
        return ~self.centroids[head].any(1)


@dataclass(frozen=True)
class Balanced:
    """The labels of a sinkhorn round: p of a head, sharpened, times the scalings of clusters."""

    weight: Float32[Tensor, "heads k D"]
    bias: Float32[Tensor, "heads k"]
    scalings: Float[Tensor, "heads k"]
    sharpness: float

    @property
    def heads(self) -> int:
        """The number of clusterings."""
        return len(self.weight)

    @property
    def k(self) -> int:
        """The number of clusters of each."""
        return self.weight.shape[1]

    def tiles(self, parts: Iterator[Float32[Tensor, "m D"]], head: int) -> Iterator[Labels]:
        """Yield the labels of each tile of rows."""
        space = Space(self.k)
        for rows in parts:
            logits = space("logits", rows, torch.float32)
            torch.addmm(self.bias[head], rows, self.weight[head].T, out=logits)
            scores = _log_softmax(logits, space("scores", rows, torch.float32))
            scores.mul_(self.sharpness)
            costs = space("costs", rows, torch.float64).copy_(scores)
            ids = costs.add_(self.scalings[head]).argmax(1)
            own = scores.gather(1, ids[:, None])[:, 0] / -self.sharpness
            second, margins = _behind(costs.neg_(), ids)
            yield _labels(ids, own, second, margins / self.sharpness)


@dataclass(frozen=True)
class Answers:
    """The largest of a method's own logits, which are the rows."""

    k: int
    heads: int = 1

    def tiles(self, parts: Iterator[Float32[Tensor, "m k"]], head: int) -> Iterator[Labels]:
        """Yield the labels of each tile of logits."""
        space = Space(self.k)
        for rows in parts:
            costs = _log_softmax(rows, space("costs", rows, torch.float32)).neg_()
            ids = rows.argmax(1)
            own = costs.gather(1, ids[:, None])[:, 0]
            second, margins = _behind(costs, ids)
            yield _labels(ids, own, second, margins)


class Space:
    """Memory for what a tile needs, [m, k] by name, that is there for every tile.

    New memory of 16 MB for each of thousands of tiles splits what malloc has, and a process grows
    by gigabytes.
    """

    def __init__(self, k: int) -> None:
        self._k, self._kept = k, dict[str, Tensor]()

    def __call__(self, name: str, rows: Tensor, dtype: torch.dtype) -> Float[Tensor, "m k"]:
        """Return the memory of this name for a tile of rows; the next call writes over it."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < len(rows):
            kept = self._kept[name] = torch.empty(len(rows), self._k, dtype=dtype)
        return kept[: len(rows)]


class Distances:
    """What orders the centroids of a row by distance, in memory that is there for every tile."""

    def __init__(self, centroids: Float32[Tensor, "k d"]) -> None:
        self._columns, self._squares = centroids.T, centroids.square().sum(1)
        self._space = Space(len(centroids))

    def __call__(self, rows: Float32[Tensor, "m d"]) -> Float32[Tensor, "m k"]:
        """Return |e|^2 - 2 x.e of each row x and centroid e; the next call writes over it."""
        scores = torch.mm(rows, self._columns, out=self._space("scores", rows, torch.float32))
        return scores.mul_(-2).add_(self._squares)


def _log_softmax(logits: Float32[Tensor, "m k"], out: Tensor) -> Float32[Tensor, "m k"]:
    written: Tensor = torch.ops.aten._log_softmax.out(logits, 1, False, out=out)
    return written


def _behind(
    costs: Float[Tensor, "m k"], best: Int64[Tensor, " m"]
) -> tuple[Int64[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the cheapest column but the best, and how much more it costs; writes over `costs`.

    Where there is none it is -1, and what it costs means nothing.
    """
    least = costs.gather(1, best[:, None])[:, 0]
    second = _second(costs, best)
    return second, costs.gather(1, second.clamp(min=0)[:, None])[:, 0] - least


def _second(costs: Float[Tensor, "m k"], best: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Return the cheapest column but the best, -1 where there is none; writes over `costs`."""
    if costs.shape[1] < 2 or not len(costs):
        return torch.full_like(best, -1)
    least, ids = costs.scatter_(1, best[:, None], torch.inf).min(1)
    return torch.where(torch.isinf(least), -1, ids)


def _labels(ids: Tensor, own: Tensor, second: Tensor, margins: Tensor) -> Labels:
    margins = torch.where(second < 0, torch.nan, margins.float())
    return Labels(
        ids.int().numpy(), own.float().numpy(), second.int().numpy(), margins.float().numpy()
    )
