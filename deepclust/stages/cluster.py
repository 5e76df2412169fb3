"""Clustering a round: moments -> whitening, and features -> k-means -> assignments.

Both are idempotent functions over the files of the run, so it doesn't matter who calls them: the
only rank itself (inline), all ranks together (gang), or the cluster worker, a process with its own
device that watches the run directory. Ranks wait for the worker's files, never in a collective.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64

from deepclust.clustering import statistics as stats
from deepclust.clustering.search import probed
from deepclust.clustering.whiten import Whitening, solve
from deepclust.data.shards.index import Index
from deepclust.errors import NumericalError, ResourceError
from deepclust.files import read_json, write_json
from deepclust.methods.base import Targets
from deepclust.recipe import Recipe
from deepclust.recipe.sections import ClusterSection, SeedsSection
from deepclust.run.directory import Run, is_done
from deepclust.run.reporting import Report
from deepclust.seeds import round as seeded_round
from deepclust.seeds.round import SeededRound
from deepclust.seeds.table import Seeds, load
from deepclust.stages.extract import merged_moments, read_excluded
from deepclust.stages.round_kmeans import Partition, Task, partition, refined
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
    two_level: bool
    seeds: tuple[SeedsSection, Seeds] | None
    device: torch.device
    report: Report
    world: World = ALONE  # the ranks that cluster together; a worker and an only rank are alone


def make_job(
    run: Run, recipe: Recipe, index: Index, device: torch.device, report: Report, world: World
) -> Job:
    """The job of a recipe, its backend and device tried first; what was given up is reported.

    The labels of a seeded one are read; see `seeds.load` and `seeded.check` for their errors.
    """
    config, refresh = recipe.clustering, recipe.method.round
    assert refresh is not None
    backend, tried, notes = probed(config.backend, device)
    if world.size > 1 and tried != device:
        raise ResourceError(f"cluster.where=ranks needs every rank's device: {'; '.join(notes)}")
    notes = [f"{note}; {backend} on {tried} is used instead" for note in notes]
    seeds = None
    if recipe.seeds is not None:
        seeds = recipe.seeds, load(index, recipe.seeds, recipe.seed)
        seeded_round.check(run, recipe, seeds[1])
        notes += seeds[1].notes
    job = Job(
        run, config.model_copy(update={"backend": backend}), recipe.seed, index,
        keep_ids=refresh.keeps_ids,
        two_level=refresh.levels == 2,
        seeds=seeds, device=tried, report=report, world=world,
    )  # fmt: skip
    _warn(job, notes)
    return job


def _warn(job: Job, notes: list[str]) -> None:
    """Tell the user; the first rank does, for all."""
    for note in notes if job.world.is_first else ():
        job.report.event("warning", text=note)


def solve_whitening(job: Job, number: int) -> None:
    """Solve round `number`'s whitening from its units' moments, unless it is done."""
    folder = job.run.round(number)
    if is_done(folder / "whitening"):
        return
    started = time.monotonic()
    whitening = solve(merged_moments(folder / "raw"), job.config.dim)
    facts: dict[str, Any] = {"rank": whitening.rank, "seconds": time.monotonic() - started}
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
    if world.broadcast_object(is_done(folder / "assignments")):
        return
    started = time.monotonic()
    rows = np.load(folder / "features" / "rows.npy", mmap_mode="r")
    excluded = np.array(list(read_excluded(folder / "features")), np.int64)
    valid = np.setdiff1d(np.arange(len(rows)), excluded)
    seeds = _seeds(job, number, rows, excluded)
    seed = derive(job.seed, "cluster", number)
    task = Task(rows, valid, job.config, job.two_level, seeds, seed, job.device, world)
    seeds, prepared = refined(task), time.monotonic()
    found = partition(replace(task, seeds=seeds))
    clustered = time.monotonic()
    _warn_seeds(job, found, seeds)
    if world.is_first:
        _publish(job, number, rows, found, seeds, started)
        job.report.event(
            "published", round=number, prepare=prepared - started, read=found.read_s,
            cluster=clustered - prepared - found.read_s, write=time.monotonic() - clustered,
        )  # fmt: skip


def advance(job: Job, number: int) -> None:
    """Do whatever of the round can be done now. What is there is not done again."""
    folder = job.run.round(number)
    if job.world.is_first and is_done(folder / "raw"):
        solve_whitening(job, number)
    if job.world.broadcast_object(is_done(folder / "features")):
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
    file = folder / "assignments" / "assignments.npy"
    kept = file.with_name("kept.npy")
    return Targets(
        round=number,
        file=file,
        assignments=np.load(file, mmap_mode="r"),
        centroids=np.load(folder / "centroids" / "centroids.npy"),
        whitening=read_whitening(folder) if is_done(folder / "whitening") else None,
        kept=np.atleast_2d(np.load(kept)) if kept.exists() else None,
    )


def read_whitening(folder: Path) -> Whitening:
    """The whitening of a round's folder."""
    return Whitening.load(folder / "whitening" / "whitening.safetensors")


def read_statistics(run: Run, number: int) -> dict[str, Any]:
    """The statistics of a finished round."""
    return dict(read_json(run.round(number) / "assignments" / "statistics.json"))


def _seeds(
    job: Job, number: int, rows: np.ndarray, excluded: Int64[np.ndarray, " e"]
) -> SeededRound | None:
    """The round's prototypes, if there are seeds; the same on every rank."""
    if job.seeds is None or number < job.seeds[0].pin_from:
        return None
    config, seeds = job.seeds
    seed = derive(job.seed, "cluster", number)
    return seeded_round.begin(job.run, number, seeds, config, rows, excluded, seed)


def _warn_seeds(job: Job, found: Partition, seeds: SeededRound | None) -> None:
    """Tell what was left out, and which classes have an empty cluster or too few sub-clusters."""
    if seeds is None:
        return
    notes = [*seeds.notes]
    if len(found.empty_fixed):
        names = seeds.names_of(found.empty_fixed)
        notes.append(f"{len(found.empty_fixed)} pinned clusters won no sample: classes {names}")
    if found.levels is not None:
        short = np.flatnonzero(found.levels.subs < job.config.k // job.config.supers)
        pinned = seeds.names_of(short[short < seeds.count])
        if len(short):
            notes.append(
                f"{len(short)} super-clusters have fewer distinct rows than sub-clusters, whose "
                f"other ids are empty; of classes: {pinned or 'none'}"
            )
    _warn(job, notes)


def _publish(
    job: Job,
    number: int,
    rows: np.ndarray,
    found: Partition,
    seeds: SeededRound | None,
    started: float,
) -> None:
    """Renumber if asked, judge, and commit: centroids first, then the assignments."""
    folder, k = job.run.round(number), job.config.k
    found, kept = _renumbered(job, number, found, seeds)
    labels = found.labels
    verdict = None if seeds is None else seeded_round.verdict(seeds, rows, *found.first_level())
    statistics = {
        "round": number,
        **stats.describe(labels, k, previous=_previous(job.run, number), classes=job.index.labels),
        "empty": k - len(np.unique(labels[labels >= 0])),
        "inertia": float(found.inertia) / max(1, int((labels >= 0).sum())),
        **found.facts,
        **_headlines(verdict, found),
        "seconds": time.monotonic() - started,
    }
    _check_collapse(statistics, job.config.max_share, folder)
    inputs = {"data": job.index.fingerprint, "round": number, "k": k}
    if job.two_level:
        inputs["supers"] = job.config.supers
    if job.seeds is not None:
        inputs["seeds"] = job.seeds[1].table.digest

    def fill_centroids(stage: Path) -> None:
        np.save(stage / "centroids.npy", found.centroids[None])
        if found.levels is not None:
            np.save(stage / "super_centroids.npy", found.levels.super_centroids)
        if seeds is not None:
            seeded_round.save(seeds, stage)

    def fill(stage: Path) -> None:
        shutil.copy(folder / "features" / "excluded.parquet", stage)  # outlives the features
        np.save(stage / "assignments.npy", labels[None])
        np.save(stage / "distances.npy", found.distances[None])
        if kept is not None:
            np.save(stage / "kept.npy", kept)
        if verdict is not None:
            write_json(stage / "seeds.json", verdict)
            np.save(stage / "forced.npy", found.claimed)
        if seeds is not None:
            np.save(stage / "labelled.npy", seeds.table.ids)
        write_json(stage / "statistics.json", statistics)

    job.run.commit(folder / "centroids", fill_centroids, inputs)
    job.run.commit(folder / "assignments", fill, inputs)
    job.report.event("clustered", **statistics)


def _renumbered(
    job: Job, number: int, found: Partition, seeds: SeededRound | None
) -> tuple[Partition, Bool[np.ndarray, " k"] | None]:
    """Ids that continue the last round's, and which do; seeded clusters keep theirs."""
    before, m = _previous(job.run, number), seeds.count if seeds else 0
    if before is None or not job.keep_ids:
        return found, None
    k, labels = job.config.k, found.labels
    matching = stats.match(_free(before, m), _free(labels, m), k - m)
    new_ids = np.concatenate([np.arange(m), m + matching.new_ids])
    kept = np.zeros(k, bool)
    kept[m + matching.new_ids[matching.overlapping]] = True
    if seeds is not None:
        kept[:m] = seeds.continues(job.run.round(_last(job.run, number)))
    labels = np.where(labels < 0, -1, new_ids[labels]).astype(np.int32)
    centroids = found.centroids[np.argsort(new_ids)]
    return replace(found, labels=labels, centroids=centroids), kept


def _free(labels: Int32[np.ndarray, " n"], m: int) -> Int32[np.ndarray, " n"]:
    """Ids of free clusters counted from 0; -1 for those of the m seeded ones."""
    free: Int32[np.ndarray, " n"] = np.maximum(labels - m, -1).astype(np.int32)
    return free


def _headlines(verdict: dict[str, Any] | None, found: Partition) -> dict[str, Any]:
    """Of the verdict, what the statistics tell."""
    if verdict is None:
        return {}
    names = ("share", "purity", "recall", "accuracy")
    numbers = {f"seeded_{name}": verdict[name] for name in names}
    return {**numbers, "seeds_forced": len(found.claimed)}


def _last(run: Run, number: int) -> int:
    """The finished round before this one; -1 for none."""
    return max((r for r in run.rounds() if r < number), default=-1)


def _previous(run: Run, number: int) -> Int32[np.ndarray, " n"] | None:
    last = _last(run, number)
    if last < 0:
        return None
    file = run.round(last) / "assignments" / "assignments.npy"
    return np.asarray(np.load(file, mmap_mode="r")[0])


def _check_collapse(statistics: dict[str, Any], max_share: float, folder: Path) -> None:
    share = statistics["largest_share"]
    if statistics["k"] > 1 and share > max_share:
        raise NumericalError(
            f"the clustering of {folder} has collapsed: one cluster holds {share:.1%} of the "
            f"images (cluster.max_share is {max_share:.0%}). The features no longer tell images "
            "apart: start a new run with a lower train.lr or more clusters, from an earlier "
            "checkpoint (init.weights) or from the beginning."
        )
