"""Clustering a round: moments -> whitening, and features -> k-means -> assignments.

Both are idempotent functions over the files of the run, so it doesn't matter who calls them: the
only rank itself (inline), all ranks together (gang), or the cluster worker, a process with its own
device that watches the run directory. Ranks wait for the worker's files, never in a collective.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64

from deepclust.clustering import assignments as stats
from deepclust.clustering.arrays import ArrayPoints
from deepclust.clustering.hierarchy import start_of
from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.search import probed
from deepclust.clustering.sharded import ShardedPoints
from deepclust.clustering.whiten import Whitening, solve
from deepclust.data.index import Index
from deepclust.errors import NumericalError, ResourceError
from deepclust.extract import merged_moments, read_excluded
from deepclust.files import read_json, write_json
from deepclust.methods.base import Targets
from deepclust.metrics import Report
from deepclust.recipe import ClusterSection, Recipe
from deepclust.rundir import Run, is_done
from deepclust.world import ALONE, World, derive

POLL_S = 0.05


@dataclass(frozen=True)
class Job:
    """What the clustering of a run needs, round after round."""

    run: Run
    config: ClusterSection
    seed: int
    index: Index
    keep_ids: bool  # head policy `match`: a cluster takes the id of the old one that it continues
    device: torch.device
    report: Report
    world: World = ALONE  # the ranks that cluster together; a worker and an only rank are alone


def make_job(
    run: Run, recipe: Recipe, index: Index, device: torch.device, report: Report, world: World
) -> Job:
    """The job of a recipe, its backend and device tried first; what was given up is reported."""
    backend, tried, notes = probed(recipe.cluster.backend, device)
    if world.size > 1 and tried != device:
        raise ResourceError(f"cluster.where=gang needs every rank's device: {'; '.join(notes)}")
    device = tried
    for note in notes if world.is_first else ():
        report.event("warning", text=f"{note}; {backend} on {device} is used instead")
    config = recipe.cluster.model_copy(update={"backend": backend})
    keep_ids = recipe.method.head == "match"
    return Job(run, config, recipe.seed, index, keep_ids, device, report, world)


def solve_whitening(job: Job, number: int) -> None:
    """Solve round `number`'s whitening from its units' moments, unless it is done."""
    folder = job.run.round(number)
    if is_done(folder / "whitening"):
        return
    started = time.monotonic()
    whitening = solve(merged_moments(folder / "raw"), job.config.dim)
    facts = {"rank": whitening.rank, "seconds": time.monotonic() - started}
    job.run.commit(
        folder / "whitening",
        lambda stage: whitening.save(stage / "whitening.safetensors"),
        {"data": job.index.fingerprint, "round": number},
        **facts,
    )
    job.report.event("whitening", round=number, **facts)
    if whitening.warning:
        job.report.event("warning", text=whitening.warning)


def cluster_features(job: Job, number: int) -> None:
    """Cluster round `number`'s features into centroids and assignments, unless it is done."""
    folder, world = job.run.round(number), job.world
    if world.share(is_done(folder / "assignments")):
        return
    started = time.monotonic()
    rows = np.load(folder / "features" / "rows.npy", mmap_mode="r")
    excluded = read_excluded(folder / "features")
    valid = np.setdiff1d(np.arange(len(rows)), np.fromiter(excluded, np.int64, len(excluded)))
    own = np.array_split(valid, world.size)[world.rank]
    found = _spread(_kmeans(job, number, rows, valid, own), own, len(rows), world)
    if world.is_first:
        _publish(job, number, found, started)


def advance(job: Job, number: int) -> None:
    """Do whatever of the round can be done now. What is there is not done again."""
    folder = job.run.round(number)
    if job.world.is_first and is_done(folder / "raw"):
        solve_whitening(job, number)
    if job.world.share(is_done(folder / "features")):
        cluster_features(job, number)


def serve(job: Job, stopping: Callable[[], bool]) -> None:
    """The cluster worker: watch the newest round and advance it, until told to stop."""
    while not stopping():
        rounds = sorted((job.run.path / "rounds").glob("[0-9]*"))
        if rounds:
            advance(job, int(rounds[-1].name))
        time.sleep(POLL_S)


def wait_for(stage: Path, stopping: Callable[[], bool]) -> bool:
    """Wait until a stage is done; False when asked to stop before."""
    while not is_done(stage):
        if stopping():
            return False
        time.sleep(POLL_S)
    return True


def read_targets(run: Run, number: int) -> Targets:
    """The finished round as the method takes it in; assignments stay on disk, memory-mapped."""
    folder = run.round(number)
    kept = folder / "assignments" / "kept.npy"
    whitening = folder / "whitening"
    return Targets(
        round=number,
        ids=np.load(folder / "assignments" / "assignments.npy", mmap_mode="r"),
        centroids=np.load(folder / "centroids" / "centroids.npy"),
        whitening=read_whitening(folder) if is_done(whitening) else None,
        kept=np.load(kept) if kept.exists() else None,
    )


def read_whitening(folder: Path) -> Whitening:
    """The whitening of a round's folder."""
    return Whitening.load(folder / "whitening" / "whitening.safetensors")


def read_statistics(run: Run, number: int) -> dict[str, Any]:
    """The statistics of a finished round."""
    return dict(read_json(run.round(number) / "assignments" / "statistics.json"))


@dataclass(frozen=True)
class _Clustering:
    """A k-means result, spread over all n samples."""

    labels: Int32[np.ndarray, " n"]
    distances: np.ndarray
    result: KMeansResult


def _kmeans(
    job: Job,
    number: int,
    rows: np.ndarray,
    valid: Int64[np.ndarray, " m"],
    own: Int64[np.ndarray, " o"],
) -> KMeansResult:
    """k-means of the valid rows, of which `own` are this rank's."""
    config, seed = job.config, derive(job.seed, "cluster", number)
    alone = job.world.size == 1
    stretch = rows[own[0] : own[-1] + 1] if len(own) else rows[:0]  # all that our device holds
    mine = ArrayPoints(stretch, device=job.device)
    if len(own) < len(stretch):
        mine = mine.select(own - own[0])
    whole = mine if alone or config.init != "two-level" else ArrayPoints(rows).select(valid)
    init = job.world.share(
        start_of(whole, config.init, config.k, seed) if job.world.is_first else ""
    )
    return kmeans(
        mine if alone else ShardedPoints(mine, job.world),
        config.k,
        iterations=config.iterations,
        seed=seed,
        init=init,
        empty=config.empty,
        min_size=config.min_size,
        backend=config.backend,
    )


def _spread(
    result: KMeansResult, own: Int64[np.ndarray, " o"], n: int, world: World
) -> _Clustering:
    """This rank's labels and distances at their ids, and those of all others added."""
    labels = np.zeros(n, np.int32)
    distances = np.zeros(n, np.float32)
    labels[own] = result.assignments + 1
    distances[own] = result.distances
    both = (world.sum(torch.from_numpy(x).to(world.device)).cpu() for x in (labels, distances))
    labels, distances = (x.numpy() for x in both)
    distances[labels == 0] = np.nan
    return _Clustering(labels - 1, distances, result)


def _publish(job: Job, number: int, found: _Clustering, started: float) -> None:
    """Renumber if asked, judge, and commit: centroids first, then the assignments."""
    folder = job.run.round(number)
    k = job.config.k
    before = _previous(job.run, number)
    labels, centroids, kept = found.labels, np.asarray(found.result.centroids), None
    if before is not None and job.keep_ids:
        matching = stats.match(before, labels, k)
        labels = np.where(labels < 0, -1, matching.new_ids[labels]).astype(np.int32)
        centroids = centroids[np.argsort(matching.new_ids)]
        kept = np.zeros(k, bool)
        kept[matching.new_ids[matching.overlapping]] = True
    statistics = {
        "round": number,
        **stats.describe(labels, k, previous=before, classes=job.index.labels),
        "inertia": float(found.result.inertia) / max(1, int((labels >= 0).sum())),
        "forced": len(found.result.forced),
        "empty_repairs": found.result.empty_repairs,
        "iterations": len(found.result.history),
        "seconds": time.monotonic() - started,
    }
    _check_collapse(statistics, job.config.max_share, folder)
    inputs = {"data": job.index.fingerprint, "round": number, "k": k}
    job.run.commit(
        folder / "centroids", lambda d: np.save(d / "centroids.npy", centroids[None]), inputs
    )

    def fill(stage: Path) -> None:
        shutil.copy(folder / "features" / "excluded.parquet", stage)  # outlives the features
        np.save(stage / "assignments.npy", labels[None])
        np.save(stage / "distances.npy", found.distances[None])
        if kept is not None:
            np.save(stage / "kept.npy", kept)
        write_json(stage / "statistics.json", statistics)

    job.run.commit(folder / "assignments", fill, inputs)
    job.report.event("clustered", **statistics)


def _previous(run: Run, number: int) -> Int32[np.ndarray, " n"] | None:
    done = [r for r in run.rounds() if r < number]
    if not done:
        return None
    file = run.round(done[-1]) / "assignments" / "assignments.npy"
    return np.asarray(np.load(file, mmap_mode="r")[0])


def _check_collapse(statistics: dict[str, Any], max_share: float, folder: Path) -> None:
    share = statistics["largest_share"]
    if share > max_share:
        raise NumericalError(
            f"the clustering of {folder} has collapsed: one cluster holds {share:.1%} of the "
            f"images (cluster.max_share is {max_share:.0%}). The features no longer tell images "
            "apart: start a new run with a lower train.lr or more clusters, from an earlier "
            "checkpoint (init.weights) or from the beginning."
        )
