"""k-means: Lloyd's iterations with fixed centroids and no empty cluster at the end.

Source: DeepCluster (Caron et al. 2018) calls `faiss.Kmeans` with 20 iterations and a random start,
which is the reference in tests. This differs where FAISS loses digits or rows: counts are int64 and
sums float64 (FAISS's float32 stop at 2^24). Nothing is subsampled, and the inertia is that of the
assignments returned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from deepclust.clustering.arguments import as_array, as_device, check_numbers
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.frame import Frame, frame_of
from deepclust.clustering.init import start
from deepclust.clustering.options import NOTHING_GIVEN, Given, KMeansOptions, OnProgress, Progress
from deepclust.clustering.points import Assignment, Points, Rows, as_tensor, unit_rows
from deepclust.clustering.repair import REPAIRS, Repaired, fill_empties, fill_small
from deepclust.clustering.search import SEARCHES
from deepclust.clustering.tiles import one_thread
from deepclust.copies import to_host
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

    centroids: Float[np.ndarray, "k d"]  # float32, and float64 where the rows needed a frame
    assignments: Int32[np.ndarray, " n"]  # nearest centroid, except for the points in `forced`
    distances: Float[np.ndarray, " n"]  # squared L2 distance to the point's centroid
    inertia: float  # weighted sum of the distances, in float64
    history: list[Iteration]
    forced: Int64[np.ndarray, " m"]  # points that the final repair gave to a cluster
    empty_fixed: Int64[np.ndarray, " e"]  # fixed centroids that won nothing
    empty_repairs: int  # empty clusters filled after the last assignment
    seconds: float

    def __repr__(self) -> str:
        (k, dim), n = self.centroids.shape, len(self.assignments)
        return f"KMeansResult({n:,} rows [{dim}] in {k:,} clusters, inertia {self.inertia:.6g})"


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
    progress: OnProgress | None = None,
) -> KMeansResult:
    """Cluster x [n, d] (numpy, memory-mapped, torch, or `Points`) by `iterations` updates.

    Fewer are made only if no point moves any more, or if `tol` is met.

    init: "random" (distinct rows), "k-means++", or centroids [k, d]. labels: old cluster ids [n]
    (-1 none) whose means are the start instead. fixed: centroids [m, d], clusters 0..m-1, that
    never change. empty: "split" as in FAISS, or "relocate", for empty clusters between iterations;
    those left at the end are always relocated. spherical: rows and centroids of unit norm, inner
    product. min_size: no free cluster ends smaller. tol: stop when the inertia changes by less than
    this share (0: no). progress: called after every pass, on every rank.

    Raises `NumericalError` naming rows that are not finite, `DataError` for fewer (distinct) points
    than clusters need, `RecipeError` for an argument that is not allowed.
    """
    name = init if isinstance(init, str) else "random"
    options = KMeansOptions(k, iterations, seed, name, empty, spherical, min_size, tol, backend)
    given = _given(None if isinstance(init, str) else init, fixed, labels)
    if hasattr(x, "assign_to"):
        if weights is not None or device is not None:
            raise RecipeError("weights and device belong to the points: give them to those")
        return solve_kmeans(cast(Points, x), options, given, progress)
    points = ArrayPoints(as_array(x, "x"), weights=weights, device=as_device(device))
    return _solve_rows(as_array(x, "x"), points, options, given, progress)


def _given(init: Rows | None, fixed: Rows | None, labels: Rows | None) -> Given:
    """Return the caller's rows as arrays; the errors name the argument."""
    named = (("init", init), ("fixed", fixed), ("labels", labels))
    return Given(*(None if rows is None else as_array(rows, name) for name, rows in named))


def _solve_rows(
    rows: Rows,
    points: ArrayPoints,
    options: KMeansOptions,
    given: Given,
    progress: OnProgress | None,
) -> KMeansResult:
    """Cluster rows in the frame where float32 can tell them apart, or as they are where it can."""
    frame = frame_of(rows, spherical=options.spherical)
    if frame is None:
        return solve_kmeans(points, options, given, progress)
    inside = replace(
        given,
        centroids=_narrowed(given.centroids, frame, points),
        fixed=_narrowed(given.fixed, frame, points),
    )
    result = solve_kmeans(points.framed(frame), options, inside, scaled(progress, frame))
    return widened(result, frame, given.fixed)


def _narrowed(rows: Rows | None, frame: Frame, points: ArrayPoints) -> Rows | None:
    """Return given rows in the frame; those of a wrong shape are refused later."""
    if rows is None or rows.ndim != 2 or rows.shape[1] != points.dim:
        return rows
    return frame.narrow(as_tensor(rows).to(points.device))


def scaled(progress: OnProgress | None, frame: Frame | None) -> OnProgress | None:
    """Return `progress` for the inertias of a clustering in a frame."""
    if progress is None or frame is None:
        return progress
    return lambda one: progress(replace(one, inertia=one.inertia * frame.area))


def widened(result: KMeansResult, frame: Frame | None, fixed: Rows | None = None) -> KMeansResult:
    """Return a result of a frame in the coordinates of the caller, fixed centroids as given.

    Centroids and distances are then float64.
    """
    if frame is None or frame.origin is None:
        return result
    centroids = frame.widen(result.centroids)
    if fixed is not None:
        centroids[: len(fixed)] = as_tensor(fixed).double().cpu().numpy()
    return replace(
        result,
        centroids=centroids,
        distances=result.distances.astype(np.float64) * frame.area,
        inertia=result.inertia * frame.area,
        history=[replace(one, inertia=one.inertia * frame.area) for one in result.history],
    )


def solve_kmeans(
    points: Points,
    options: KMeansOptions,
    given: Given = NOTHING_GIVEN,
    progress: OnProgress | None = None,
) -> KMeansResult:
    """Cluster points; see `kmeans`, which is the same with one argument for every option."""
    _check_options(options)
    passes = _Passes(options.iterations + 1, progress)
    points = points.configure(spherical=options.spherical, backend=options.backend)
    points.check_finite()
    with one_thread():  # the points have their threads
        anchors = _anchors(points, options, given.fixed)
        _check_counts(points, options, len(anchors))
        centroids = torch.cat([anchors, start(points, anchors, options, given)])
        if options.spherical:
            centroids[len(anchors) :] = unit_rows(centroids[len(anchors) :])
        centroids, before, history = _lloyd(points, centroids, len(anchors), options, passes)
        assignment = points.assign_to(centroids)
        facts = _Facts.of(points, assignment, before, len(anchors))
        passes.end(facts.inertia, facts.moved)
        has_empties = len(facts.empties) > 0
        repaired = fill_empties(points, centroids, assignment, len(anchors), has_empties)
        if options.min_size > 1:
            repaired = fill_small(points, repaired, options.min_size, len(anchors))
        return _result(repaired, history, len(anchors), passes.seconds)


def _result(
    repaired: Repaired, history: list[Iteration], fixed: int, seconds: float
) -> KMeansResult:
    one = repaired.assignment
    wanted = (repaired.centroids, one.cluster_ids, one.distances, repaired.forced)
    facts = (part.numpy() for part in to_host(*wanted, one.counts[:fixed], one.cost))
    centroids, assignments, distances, forced, of_fixed, cost = facts
    return KMeansResult(
        centroids=centroids,
        assignments=assignments,
        distances=distances,
        inertia=float(cost),
        history=history,
        forced=forced,
        empty_fixed=np.flatnonzero(of_fixed == 0),
        empty_repairs=repaired.repairs,
        seconds=seconds,
    )


@dataclass
class _Passes:
    """Counts the passes and reports each."""

    of: int
    progress: OnProgress | None
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, inertia: float, moved: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(Progress(self.done, self.of, inertia, moved, self.seconds))

    def end(self, inertia: float, moved: int) -> None:
        self.of = self.done + 1
        self.add(inertia, moved)


def _lloyd(
    points: Points,
    centroids: Float32[Tensor, "k d"],
    fixed: int,
    options: KMeansOptions,
    passes: _Passes,
) -> tuple[Float32[Tensor, "k d"], Assignment | None, list[Iteration]]:
    """Assign, move every free centroid to its mean and repair empties, `iterations` times."""
    draws = generator(options.seed, "kmeans", "empty")
    history: list[Iteration] = []
    before: Assignment | None = None
    for _ in range(options.iterations):
        assignment = points.assign_to(centroids, before, options.tol > 0)
        facts = _Facts.of(points, assignment, before, fixed)
        empties = facts.empties
        if len(empties) and options.empty == "relocate" and options.tol == 0:
            assignment = points.assign_to(centroids, before)  # once more, with distances
            facts = _Facts.of(points, assignment, before, fixed)
        centroids = _update(points, centroids, assignment, fixed)
        donors = np.zeros(0, np.int64)
        if len(empties):
            repair = REPAIRS[options.empty]
            donors = repair(points, centroids, assignment, empties, fixed, draws)
            if points.spherical:
                centroids[fixed:] = unit_rows(centroids[fixed:])
        history.append(Iteration(facts.inertia, len(empties), donors.tolist(), facts.moved))
        passes.add(facts.inertia, facts.moved)
        before = assignment
        if _settled(history, options.tol):
            break
    return centroids, before, history


@dataclass(frozen=True)
class _Facts:
    """What the host decides by after a pass: it waits for a GPU once for all of it."""

    inertia: float
    moved: int  # points that changed cluster, all of them in the first pass
    empties: Int64[np.ndarray, " e"]  # free clusters that won nothing

    @classmethod
    def of(
        cls, points: Points, assignment: Assignment, before: Assignment | None, fixed: int
    ) -> _Facts:
        """Fetch the facts of a pass; raise `NumericalError` where distances overflow."""
        cost = assignment.cost[None]
        moved = torch.full_like(cost, points.n)
        if before is not None:
            moved = points.count(assignment.cluster_ids != before.cluster_ids)[None].double()
        is_empty = (assignment.counts[fixed:] == 0).double()
        facts = torch.cat([cost, moved, is_empty]).cpu().numpy()
        if not np.isfinite(facts[0]):
            raise NumericalError(
                "the inertia is not finite: distances overflow float32. Scale the features down."
            )
        return cls(float(facts[0]), int(facts[1]), np.flatnonzero(facts[2:]) + fixed)


def _update(
    points: Points, centroids: Float32[Tensor, "k d"], assignment: Assignment, fixed: int
) -> Float32[Tensor, "k d"]:
    """Return means of the free clusters (spherical: mean directions).

    One without mass stays.
    """
    means = assignment.sums / assignment.mass[:, None]
    movable = assignment.mass > 0
    if points.spherical:
        movable &= (assignment.sums != 0).any(1)
        means = unit_rows(means)
    movable[:fixed] = False
    return torch.where(movable[:, None], means.float(), centroids)


def _settled(history: list[Iteration], tol: float) -> bool:
    """Return whether nothing moved, or the inertia changed by a share of at most `tol`."""
    if len(history) < 2 or history[-1].empties:
        return False
    before, now = history[-2].inertia, history[-1].inertia
    return history[-1].moved == 0 or (tol > 0 and abs(before - now) <= tol * before)


def _anchors(points: Points, options: KMeansOptions, fixed: Rows | None) -> Float32[Tensor, "m d"]:
    """Return the fixed centroids, for a spherical clustering scaled once to unit norm."""
    if fixed is None:
        return torch.zeros(0, points.dim, device=points.device)
    anchors = as_tensor(fixed).to(points.device, torch.float32)
    if anchors.ndim != 2 or anchors.shape[1] != points.dim or len(anchors) > options.k:
        raise RecipeError(
            f"fixed must have shape (m <= k={options.k}, {points.dim}), got {tuple(anchors.shape)}"
        )
    if not torch.isfinite(anchors).all():
        raise NumericalError("fixed has a row that is not finite")
    if not options.spherical:
        return anchors
    norms = torch.linalg.vector_norm(anchors, dim=1, keepdim=True)
    # those of unit norm already keep their bits
    return torch.where((norms - 1).abs() < 1e-5, anchors, unit_rows(anchors))


def _check_options(options: KMeansOptions) -> None:
    check_numbers(options)
    for name, known in (("empty", REPAIRS), ("backend", SEARCHES)):
        if (chosen := getattr(options, name)) not in known:
            raise RecipeError(f"{name}={chosen!r} is not known; use one of {sorted(known)}")


def _check_counts(points: Points, options: KMeansOptions, fixed: int) -> None:
    """Raise `DataError` for fewer points than the free clusters need.

    A fixed one may end without any.
    """
    free, min_size = options.k - fixed, options.min_size
    weights = points.list_weights()
    rows = points.n if weights is None else int(np.count_nonzero(weights))
    if points.n and rows == 0:
        raise DataError("all weights are 0: no row counts. Give some rows a weight above 0.")
    if free * min_size > rows:
        each = f" of at least {min_size} points" if min_size > 1 else ""
        beside = f" beside {fixed} fixed ones" if fixed else ""
        weighing = "" if rows == points.n else " of a weight above 0"
        raise DataError(
            f"{free} clusters{each}{beside} need {free * min_size} points, but there are only "
            f"{rows}{weighing}. Set cluster.k to at most {fixed + rows // min_size}."
        )
