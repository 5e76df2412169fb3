"""Clustering a round: moments -> whitening, and features -> k-means -> assignments.

Both are idempotent functions over the files of the run. Any process can call
them: the only rank (inline), all ranks together, or the cluster worker. The worker is a process
with a device for itself that watches the run directory. Ranks wait for the worker's files, never in
a collective.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Int64
from safetensors.torch import load_file
from torch import Tensor

from deepclust.clustering.options import Progress
from deepclust.clustering.probe import probe_backend
from deepclust.clustering.whiten import solve
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, ResourceError
from deepclust.files import reading
from deepclust.methods.base import Targets
from deepclust.recipe import Recipe
from deepclust.recipe.declare import Refresh
from deepclust.recipe.sections import ClusterSection, SeedsSection
from deepclust.run.directory import Run, is_done, manifest, numbered, whole_file
from deepclust.run.final_round import trained_number
from deepclust.run.reporting import Report
from deepclust.run.round_files import (
    find_whitening,
    read_array,
    read_assignments,
    read_excluded,
    read_kept,
)
from deepclust.run.settled import is_settled
from deepclust.run.signs import computing
from deepclust.seeds import round as seeded_round
from deepclust.seeds.round import SeededRound
from deepclust.seeds.table import Seeds, load
from deepclust.stages.extract import merge_moments
from deepclust.stages.progress import StageProgress
from deepclust.stages.project import SCORER
from deepclust.stages.publish import publish
from deepclust.stages.round_kmeans import RoundClusters, RoundTask, cluster_round, refine_seeds
from deepclust.stages.round_sinkhorn import label_round
from deepclust.world import ALONE, World, derive

POLL_S = 0.05
FEW = 10  # images of a cluster, on average
ROWS = re.compile(r"rows(-\d+)?\.npy")


@dataclass(frozen=True)
class ClusterContext:
    """What the clustering of a run needs, round after round."""

    run: Run
    config: ClusterSection
    refresh: Refresh
    seed: int
    index: Index
    seeds: tuple[SeedsSection, Seeds] | None
    device: torch.device
    report: Report
    world: World = ALONE  # the ranks that cluster together; a worker or an only rank is alone

    def warn(self, notes: list[str]) -> None:
        """Report warnings, once for all ranks."""
        for note in notes if self.world.is_first else ():
            self.report.event("warning", text=note)


def make_context(
    run: Run, recipe: Recipe, index: Index, device: torch.device, report: Report, world: World
) -> ClusterContext:
    """Return the context of a recipe, its backend and device tested.

    A fallback is reported.

    The labels of seeds are read. See `seeds.table.load` and `seeds.round.check` for their errors.
    """
    config, refresh = recipe.clustering, recipe.method.round
    assert refresh is not None, "the method has no rounds"
    backend, usable, notes = probe_backend(config.backend, device, config.device != "auto")
    if world.size > 1 and usable != device:
        raise ResourceError(f"cluster.where=ranks needs every rank's device: {'; '.join(notes)}")
    if (backend, usable) != (config.backend, device):
        notes = [f"{note}; {backend} on {usable} is used instead" for note in notes]
    seeds = None
    if recipe.seeds is not None and refresh.kind == "k-means":  # else there is nothing to pin
        seeds = recipe.seeds, load(index, recipe.seeds, recipe.seed)
        seeded_round.check(run, recipe, seeds[1])
        notes += seeds[1].notes
    notes += note_of_k(config.k, len(index))
    config = config.model_copy(update={"backend": backend})
    context = ClusterContext(run, config, refresh, recipe.seed, index, seeds, usable, report, world)
    context.warn(notes)
    return context


def note_of_k(k: int, n: int) -> list[str]:
    """Return a warning where clusters are too small on average, and which k would do."""
    if k * FEW <= n:
        return []
    fix = f"cluster.k={n // FEW} or less gives {FEW}" if n >= 2 * FEW else "More images would do"
    return [
        f"cluster.k={k} for {n:,} images is {n / k:.1f} a cluster: so few images are learnt by "
        f"heart, and clusters change with the draw. {fix}"
    ]


def solve_whitening(context: ClusterContext, number: int) -> None:
    """Solve round `number`'s whitening from its chunks' moments, unless it is done."""
    round_dir = context.run.round(number)
    if is_done(round_dir / "whitening"):
        return
    started = time.monotonic()
    progress = StageProgress(context.report, ALONE, "whiten", number)
    moments = merge_moments(round_dir / "raw", progress)
    with computing(context.report.alive):  # eigenvectors of thousands of dimensions take minutes
        whitening = solve(moments, context.config.dim, device=context.device)
    facts: dict[str, Any] = {"rank": whitening.rank, "seconds": time.monotonic() - started}
    context.run.commit(
        round_dir / "whitening",
        lambda stage: whitening.save(stage / "whitening.safetensors"),
        {"data": context.index.fingerprint, "round": number},
        **facts,
    )
    context.report.event("whitening", round=number, **facts)
    if whitening.warning:
        context.report.event("warning", text=whitening.warning)


def cluster_features(context: ClusterContext, number: int) -> None:
    """Cluster round `number`'s features into centroids and assignments, unless it is done."""
    round_dir, world = context.run.round(number), context.world
    if world.broadcast_object(is_done(round_dir / "assignments")):
        return
    started = time.monotonic()
    task = make_task(context, number)
    seeds, prepared = refine_seeds(task), time.monotonic()
    solve_round = label_round if context.refresh.kind == "sinkhorn" else cluster_round
    heads, read_s = solve_round(replace(task, seeds=seeds))
    clustered = time.monotonic()
    context.warn(_seed_notes(context.config, heads[0], seeds))
    if world.is_first:
        with computing(context.report.alive):  # statistics of all samples
            publish(context, number, task.rows, heads, seeds, started)
        context.report.event(
            "published",
            round=number,
            prepare=prepared - started,
            read=read_s,
            cluster=clustered - prepared - read_s,
            write=time.monotonic() - clustered,
        )
    release(context.device)


def release(device: torch.device) -> None:
    """Give the memory of a round back, which other processes on the same GPU cannot have before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_task(context: ClusterContext, number: int) -> RoundTask:
    """Return the k-means of a round whose features are done, with this round's prototypes."""
    features_dir = context.run.round(number) / "features"
    refresh = context.refresh
    if drawn := number == 0 and refresh.first == "balanced":  # there are no rows
        rows, others = np.zeros((len(context.index), 0), np.float16), []
    else:
        rows, *others = _read_rows(context, features_dir)
    scores = refresh.kind == "sinkhorn" and not drawn
    excluded = np.array(list(read_excluded(features_dir)), np.int64)
    progress = StageProgress(context.report, context.world, "cluster", number)

    def show(head: int, passes: Progress) -> None:
        facts: dict[str, float] = {"head": head} if refresh.heads > 1 else {}
        facts |= {"level": passes.level} if refresh.levels > 1 else {}
        if refresh.kind == "k-means":
            facts |= {"inertia": passes.inertia, "moved": passes.moved}
        progress.show(passes.pass_, passes.of, passes.eta, **facts)

    return RoundTask(
        rows,
        np.setdiff1d(np.arange(len(rows)), excluded),
        context.config,
        refresh,
        _seeds(context, number, rows, excluded),
        head_seeds(context.seed, number, context.refresh.heads),
        context.device,
        context.world,
        context.report,
        show,
        tuple(others),
        _read_scorer(features_dir) if scores else None,
    )


def head_seeds(seed: int, number: int, heads: int) -> tuple[int, ...]:
    """Return the random seeds of a round's heads.

    Head 0 has the one of rounds with one head.
    """
    first = derive(seed, "cluster", number)
    return first, *(derive(seed, "cluster", number, "head", head) for head in range(1, heads))


def advance(context: ClusterContext, number: int) -> None:
    """Do whatever of the round can be done now.

    What is there is not done again.
    """
    round_dir = context.run.round(number)
    if context.refresh.whiten and context.world.is_first and is_done(round_dir / "raw"):
        solve_whitening(context, number)
    context.world.barrier()  # without a time limit, as one rank solves for all
    if context.world.broadcast_object(is_done(round_dir / "features")):
        cluster_features(context, number)


def serve(context: ClusterContext, stopping: Callable[[], bool]) -> None:
    """Watch the newest round and advance it until a stop is wanted, as the cluster worker.

    It begins when the first rank has settled the rounds of this attempt (`run.settled`).
    """
    while not (is_settled(context.run) or stopping()):
        time.sleep(POLL_S)
    while not stopping():
        rounds = numbered(context.run.path / "rounds")
        if rounds:
            advance(context, int(rounds[-1].name))
        time.sleep(POLL_S)


def wait_for(stage: Path, stopping: Callable[[], bool]) -> bool:
    """Wait until a stage is done, or return False when a stop is wanted before.

    `stopping` is a sign of life or none. It must be none where another rank does the stage: then
    that rank's own signs tell a long stage from a hang.
    """
    while not is_done(stage):
        if stopping():
            return False
        time.sleep(POLL_S)
    return True


def read_targets(run: Run, number: int) -> Targets:
    """Return a finished round with all its heads, its files compared with their hashes.

    Assignments stay on disk, memory-mapped. Raises `DataError` for a file that is not as it was
    written.
    """
    round_dir = run.round(number)
    return Targets(
        round=number,
        file=round_dir / "assignments" / "assignments.npy",
        assignments=read_assignments(run, number),
        centroids=np.array(read_array(round_dir / "centroids", "centroids.npy", run.alive, dims=3)),
        whitening=find_whitening(round_dir),
        kept=read_kept(round_dir),
    )


def _read_rows(context: ClusterContext, features_dir: Path) -> list[Float16[np.ndarray, "n d"]]:
    """Return the rows of all samples, memory-mapped: one array for each part of a bank."""
    names = [name for name in manifest(features_dir)["files"] if ROWS.fullmatch(name)]
    arrays = []
    for name in sorted(names or ["rows.npy"], key=lambda name: (len(name), name)):
        _check_whole(context.world, features_dir, name, context.report.alive)
        with reading(features_dir / name):
            arrays.append(np.load(features_dir / name, mmap_mode="r", allow_pickle=False))
    return arrays


def _check_whole(world: World, features_dir: Path, name: str, alive: Callable[[], None]) -> None:
    """Compare a large file with its hash, each rank its share; raise on all ranks if it differs."""
    error = None
    try:
        whole_file(features_dir, name, alive, (world.rank, world.size))
    except DataError as raised:
        error = raised
    world.barrier()
    world.raise_all(error, f"{features_dir / name}")


def _read_scorer(features_dir: Path) -> dict[str, Tensor]:
    """Return what scores the rows: weight [heads, k, d] and bias [heads, k]."""
    file = whole_file(features_dir, SCORER)
    with reading(file):
        scorer: dict[str, Tensor] = load_file(file)
        return scorer


def _seeds(
    context: ClusterContext, number: int, rows: np.ndarray, excluded: Int64[np.ndarray, " e"]
) -> SeededRound | None:
    """Return the round's prototypes, if it is seeded, the same on every rank."""
    if context.seeds is None or trained_number(context.run, number) < context.seeds[0].pin_from:
        return None
    config, seeds = context.seeds
    seed = derive(context.seed, "cluster", number)
    return seeded_round.begin(context.run, number, seeds, config, rows, excluded, seed)


def _seed_notes(
    config: ClusterSection, clusters: RoundClusters, seeds: SeededRound | None
) -> list[str]:
    """Return what was left out, and the classes with an empty cluster or too few sub-clusters."""
    if seeds is None:
        return []
    notes = [*seeds.notes]
    if len(clusters.empty_fixed):
        names = seeds.names_of(clusters.empty_fixed)
        notes.append(f"{len(clusters.empty_fixed)} pinned clusters won no sample: classes {names}")
    if clusters.levels is not None:
        short = np.flatnonzero(clusters.levels.subs < config.k // config.supers)
        pinned = seeds.names_of(short[short < seeds.count])
        if len(short):
            notes.append(
                f"{len(short)} super-clusters have fewer distinct rows than sub-clusters, whose "
                f"other ids are empty; of classes: {pinned or 'none'}"
            )
    return notes
