"""k-means: Lloyd's iterations with fixed centroids and no empty cluster at the end.

Source: DeepCluster (Caron et al. 2018) calls `faiss.Kmeans` with 20 iterations and a random start;
that is our reference in tests. We differ where FAISS loses (`notes/clustering-performance.md`, 2):
counts are int64 and sums float64 (FAISS's float32 stop at 2^24), nothing is subsampled, and the
inertia is that of the assignments returned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.init import start
from deepclust.clustering.points import Pass, Points, Rows, as_tensor, unit_rows
from deepclust.clustering.repair import REPAIRS, fill_empties, fill_small
from deepclust.clustering.search import SEARCHES
from deepclust.clustering.tiles import one_thread
from deepclust.errors import DataError, NumericalError, RecipeError
from deepclust.world import generator


@dataclass(frozen=True)
class Iteration:
    """One update: `inertia`, `empties` and `moved` are of the assignment before it."""

    inertia: float
    empties: int  # free clusters that won nothing
    donors: list[int]  # clusters that were split, or gave a point, for them
    moved: int  # points whose cluster changed (all of them in the first iteration)


@dataclass(frozen=True)
class KMeansResult:
    """Centroids and the assignment of every point to its nearest one."""

    centroids: Float32[np.ndarray, "k d"]
    assignments: Int32[np.ndarray, " n"]  # nearest centroid, save the ids in `forced`
    distances: Float32[np.ndarray, " n"]  # squared L2 distance to the own centroid
    inertia: float  # weighted sum of the distances, in float64
    history: list[Iteration]
    forced: Int64[np.ndarray, " m"]  # points that the final repair gave to a cluster
    empty_fixed: Int64[np.ndarray, " e"]  # fixed centroids that won nothing
    empty_repairs: int  # empty clusters filled after the last assignment
    seconds: float


def kmeans(
    x: Rows | Points,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    init: str | Rows = "random",
    fixed: Rows | None = None,
    empty: str = "split",
    weights: Rows | None = None,
    spherical: bool = False,
    min_size: int = 1,
    tol: float = 0.0,
    backend: str = "auto",
    device: torch.device | str | None = None,
    labels: Rows | None = None,
) -> KMeansResult:
    """Cluster x [n, d] (numpy, memory-mapped, torch, or `Points`) by `iterations` updates.

    Fewer are made only if no point moves any more, which changes nothing, or if `tol` is met.

    init: "random" (distinct rows), "k-means++", or centroids [k, d]. labels: old ids [n] (-1 none)
    whose means are the start instead. fixed: centroids [m, d], ids 0..m-1, that never change.
    empty: "split" as in FAISS, or "relocate", for empties between iterations; those left at the end
    are always relocated. spherical: rows and centroids of unit norm, inner product. min_size: no
    free cluster ends smaller. tol: stop when the inertia changes by less than this share (0: no).

    Raises `NumericalError` naming rows that are not finite, `DataError` for fewer (distinct) points
    than clusters need, `RecipeError` for an argument that is not allowed.
    """
    began = time.monotonic()
    _check_choices(k, iterations, empty, backend, min_size)
    points = _points(x, weights, spherical, backend, device)
    with one_thread():  # beside the threads of the points
        anchors = _anchors(points, k, fixed, spherical)
        _check_counts(points, k, min_size)
        old = None if labels is None else as_tensor(labels).to(points.device, torch.int32)
        centroids = torch.cat([anchors, start(points, k - len(anchors), anchors, init, old, seed)])
        if spherical:
            centroids[len(anchors) :] = unit_rows(centroids[len(anchors) :])
        centroids, history = _lloyd(points, centroids, len(anchors), iterations, empty, tol, seed)
        done = fill_empties(points, centroids, _visit(points, centroids), len(anchors))
        if min_size > 1:
            done = fill_small(points, done, min_size, len(anchors))
        return KMeansResult(
            centroids=done.centroids.cpu().numpy(),
            assignments=done.found.labels.cpu().numpy(),
            distances=done.found.distances.cpu().numpy(),
            inertia=done.found.inertia,
            history=history,
            forced=done.forced.cpu().numpy(),
            empty_fixed=(done.found.counts[: len(anchors)] == 0).nonzero().flatten().cpu().numpy(),
            empty_repairs=done.repairs,
            seconds=time.monotonic() - began,
        )


def _lloyd(
    points: Points,
    centroids: Float32[Tensor, "k d"],
    fixed: int,
    iterations: int,
    empty: str,
    tol: float,
    seed: int,
) -> tuple[Float32[Tensor, "k d"], list[Iteration]]:
    """Assign, move every free centroid to its mean, repair empties; `iterations` times."""
    draws = generator(seed, "kmeans", "empty")
    history: list[Iteration] = []
    before: Pass | None = None
    for _ in range(iterations):
        found = _visit(points, centroids, before, distances=tol > 0)
        empties = (found.counts[fixed:] == 0).nonzero().flatten().cpu().numpy() + fixed
        if len(empties) and empty == "relocate" and tol == 0:
            found = _visit(points, centroids, before)  # once more, with distances
        centroids = _update(points, centroids, found, fixed)
        donors = np.zeros(0, np.int64)
        if len(empties):
            donors = REPAIRS[empty](points, centroids, found, empties, fixed, draws)
            if points.unit:
                centroids[fixed:] = unit_rows(centroids[fixed:])
        moved = points.n if before is None else points.count(found.labels != before.labels)
        history.append(Iteration(found.inertia, len(empties), donors.tolist(), moved))
        before = found
        if _settled(history, tol):
            break
    return centroids, history


def _visit(
    points: Points,
    centroids: Float32[Tensor, "k d"],
    before: Pass | None = None,
    distances: bool = True,
) -> Pass:
    found = points.visit(centroids, before, distances)
    if not np.isfinite(found.inertia):
        raise NumericalError(
            "the inertia is not finite: distances overflow float32. Scale the features down."
        )
    return found


def _update(
    points: Points, centroids: Float32[Tensor, "k d"], found: Pass, fixed: int
) -> Float32[Tensor, "k d"]:
    """Free centroids become the means (unit: mean directions); one without mass stays."""
    means = found.sums / found.mass[:, None]
    alive = found.mass > 0
    if points.unit:
        alive &= (found.sums != 0).any(1)
        means = unit_rows(means)
    alive[:fixed] = False
    return torch.where(alive[:, None], means.float(), centroids)


def _settled(history: list[Iteration], tol: float) -> bool:
    """Nothing moved, so nothing ever will; or the inertia changed by a share of at most `tol`."""
    if len(history) < 2 or history[-1].empties:
        return False
    before, now = history[-2].inertia, history[-1].inertia
    return history[-1].moved == 0 or (tol > 0 and abs(before - now) <= tol * before)


def _points(
    x: Rows | Points,
    weights: Rows | None,
    spherical: bool,
    backend: str,
    device: torch.device | str | None,
) -> Points:
    if isinstance(x, np.ndarray | Tensor):
        x = ArrayPoints(x, weights=weights, device=device)
    else:
        assert weights is None, "weights belong to the points"
        assert device is None, "the device belongs to the points"
    points = x.configured(unit=spherical, backend=backend)
    points.check_finite()
    return points


def _anchors(points: Points, k: int, fixed: Rows | None, spherical: bool) -> Float32[Tensor, "m d"]:
    """The fixed centroids; for a spherical clustering those not of unit norm are scaled once."""
    if fixed is None:
        return torch.zeros(0, points.dim, device=points.device)
    anchors = as_tensor(fixed).to(points.device, torch.float32)
    if anchors.ndim != 2 or anchors.shape[1] != points.dim or len(anchors) > k:
        raise RecipeError(
            f"fixed must have shape (m <= k={k}, {points.dim}), got {tuple(anchors.shape)}"
        )
    if not torch.isfinite(anchors).all():
        raise NumericalError("fixed has a row that is not finite")
    if not spherical:
        return anchors
    norms = torch.linalg.vector_norm(anchors, dim=1, keepdim=True)
    return torch.where((norms - 1).abs() < 1e-5, anchors, unit_rows(anchors))


def _check_choices(k: int, iterations: int, empty: str, backend: str, min_size: int) -> None:
    if k < 1 or iterations < 0 or min_size < 1:
        raise RecipeError(
            f"k={k} and min_size={min_size} must be at least 1, iterations={iterations} at least 0"
        )
    if empty not in REPAIRS:
        raise RecipeError(f"empty={empty!r} is not known; use one of {sorted(REPAIRS)}")
    if backend not in SEARCHES:
        raise RecipeError(f"backend={backend!r} is not known; use one of {sorted(SEARCHES)}")


def _check_counts(points: Points, k: int, min_size: int) -> None:
    if k * min_size > points.n:
        each = f" of at least {min_size} points" if min_size > 1 else ""
        raise DataError(
            f"{k} clusters{each} need {k * min_size} points, but there are only {points.n}. "
            f"Set cluster.k to at most {points.n // min_size}."
        )
