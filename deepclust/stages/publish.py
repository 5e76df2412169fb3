"""Publishing a round: matched ids, statistics, and the files that training and tools read.

centroids/     centroids.npy [heads, k, d], super_centroids.npy [s, d] (several heads: one each),
               pivot.npy [D], about which rows were rounded, and for a sinkhorn round
               weight.npy [heads, k, d], bias.npy and scalings.npy [heads, k]
assignments/   assignments.npy [heads, n], distances.npy [heads, n], kept.npy [heads, k],
               statistics.json (head 0; `heads` lists all, where there are several),
               moved.npy [m, 2]: head and sample id where the row alone does not tell the cluster
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32

from deepclust.clustering import statistics as stats
from deepclust.errors import NumericalError
from deepclust.files import write_json
from deepclust.run.round_files import last_round_before, read_assignments
from deepclust.seeds import round as seeded_round
from deepclust.seeds.round import SeededRound
from deepclust.stages.raw_chunk import read_pivot
from deepclust.stages.round_kmeans import RoundClusters

if TYPE_CHECKING:
    from deepclust.stages.cluster import ClusterContext


@dataclass(frozen=True)
class _Head:
    """One head of a round, as it is written."""

    clusters: RoundClusters
    kept: Bool[np.ndarray, " k"] | None  # clusters whose id continues one of the round before
    seed_report: dict[str, Any] | None
    statistics: dict[str, Any]


def publish(
    context: ClusterContext,
    number: int,
    rows: np.ndarray,
    clusters: list[RoundClusters],
    seeds: SeededRound | None,
    started: float,
) -> None:
    """Match ids, compute statistics, and commit: centroids first, then the assignments.

    Raises `NumericalError` when one cluster of a head holds more than `cluster.max_share`.
    """
    round_dir = context.run.round(number)
    heads = [_prepare(context, number, rows, h, one, seeds) for h, one in enumerate(clusters)]
    statistics = {
        "round": number,
        **heads[0].statistics,  # what a table or a curve of rounds shows
        "seconds": time.monotonic() - started,
    }
    if len(heads) > 1:
        statistics["heads"] = [head.statistics for head in heads]
    for head in heads:
        _check_collapse(head.statistics, context.config.max_share, round_dir)
    inputs = _inputs(context, number)

    def fill_centroids(stage: Path) -> None:
        _write_centroids(stage, heads, seeds)
        if (round_dir / "raw" / "pivot.npy").exists():
            np.save(stage / "pivot.npy", read_pivot(round_dir / "raw"))

    def fill_assignments(stage: Path) -> None:
        # the features may be deleted, and the assignments stay
        shutil.copy(round_dir / "features" / "excluded.parquet", stage)
        _write_assignments(stage, heads, seeds)
        write_json(stage / "statistics.json", statistics)

    context.run.commit(round_dir / "centroids", fill_centroids, inputs)
    context.run.commit(round_dir / "assignments", fill_assignments, inputs)
    context.report.event("clustered", **statistics)


def _prepare(
    context: ClusterContext,
    number: int,
    rows: np.ndarray,
    head: int,
    clusters: RoundClusters,
    seeds: SeededRound | None,
) -> _Head:
    """Match a head's ids to those of the same head of the round before, and describe it."""
    previous = _previous(context, number, head)
    clusters, kept = _match_ids(context, number, clusters, previous, seeds)
    report = None
    if seeds is not None:
        report = seeded_round.evaluate_seeds(seeds, rows, *clusters.first_level())
    assignments, k = clusters.assignments, context.config.k
    sizes = stats.sizes_of(assignments, k)
    statistics = {
        **stats.describe(assignments, k, previous=previous, classes=context.index.labels),
        "empty": int((sizes == 0).sum()),
        "inertia": float(clusters.inertia) / max(1, int(sizes.sum())),
        **clusters.facts,
        **_seed_statistics(report, clusters),
    }
    return _Head(clusters, kept, report, statistics)


def _inputs(context: ClusterContext, number: int) -> dict[str, Any]:
    """Return what the round was made from, for its manifests."""
    inputs = {"data": context.index.fingerprint, "round": number, "k": context.config.k}
    if context.refresh.levels == 2:
        inputs["supers"] = context.config.supers
    if context.seeds is not None:
        inputs["seeds"] = context.seeds[1].table.digest
    return inputs


def _write_centroids(stage: Path, heads: list[_Head], seeds: SeededRound | None) -> None:
    np.save(stage / "centroids.npy", np.stack([head.clusters.centroids for head in heads]))
    levels = [head.clusters.levels for head in heads]
    supers = [one.super_centroids for one in levels if one is not None]
    if supers:
        np.save(stage / "super_centroids.npy", np.stack(supers) if len(supers) > 1 else supers[0])
    for name in heads[0].clusters.rule:
        np.save(stage / f"{name}.npy", np.stack([head.clusters.rule[name] for head in heads]))
    if seeds is not None:
        seeded_round.save(seeds, stage)


def _write_assignments(stage: Path, heads: list[_Head], seeds: SeededRound | None) -> None:
    clusters = [head.clusters for head in heads]
    np.save(stage / "assignments.npy", np.stack([one.assignments for one in clusters]))
    np.save(stage / "distances.npy", np.stack([one.distances for one in clusters]))
    moved = [np.stack([np.full_like(one.moved, h), one.moved], 1) for h, one in enumerate(clusters)]
    if any(map(len, moved)):
        np.save(stage / "moved.npy", np.concatenate(moved))
    if any(head.kept is not None for head in heads):
        none = np.zeros(len(clusters[0].centroids), bool)
        kept = [none if head.kept is None else head.kept for head in heads]
        np.save(stage / "kept.npy", np.stack(kept))
    # labelled samples are judged and drawn by the assignments of head 0, as the plan is
    if heads[0].seed_report is not None:
        write_json(stage / "seeds.json", heads[0].seed_report)
        np.save(stage / "forced.npy", clusters[0].claimed)
    if seeds is not None:
        np.save(stage / "labelled.npy", seeds.table.sample_ids)


def _match_ids(
    context: ClusterContext,
    number: int,
    clusters: RoundClusters,
    previous: Int32[np.ndarray, " n"] | None,
    seeds: SeededRound | None,
) -> tuple[RoundClusters, Bool[np.ndarray, " k"] | None]:
    """Return ids that continue the last round's, and which do.

    Seeded clusters keep theirs.
    """
    if previous is None or not context.refresh.keeps_ids:
        return clusters, None
    k, m, assignments = context.config.k, seeds.count if seeds else 0, clusters.assignments
    matching = stats.match(_free(previous, m), _free(assignments, m), k - m)
    new_ids = np.concatenate([np.arange(m), m + matching.new_ids])
    kept = np.zeros(k, bool)
    kept[m + matching.new_ids[matching.overlapping]] = True
    if seeds is not None:
        last = last_round_before(context.run, number)
        assert last is not None
        kept[:m] = seeds.continues(context.run.round(last))
    renamed = np.append(new_ids, -1).astype(np.int32)  # -1, excluded, stays: it is the last
    assignments = renamed[assignments]
    centroids = clusters.centroids[np.argsort(new_ids)]
    return replace(clusters, assignments=assignments, centroids=centroids), kept


def _free(assignments: Int32[np.ndarray, " n"], m: int) -> Int32[np.ndarray, " n"]:
    """Return ids of free clusters counted from 0, or -1 for those of the m seeded ones."""
    free: Int32[np.ndarray, " n"] = np.maximum(assignments - m, -1).astype(np.int32)
    return free


def _seed_statistics(report: dict[str, Any] | None, clusters: RoundClusters) -> dict[str, Any]:
    """Return the part of the report of the seeds that belongs into the statistics."""
    if report is None:
        return {}
    names = ("share", "purity", "recall", "accuracy")
    numbers = {f"seeded_{name}": report[name] for name in names}
    return {**numbers, "seeds_forced": len(clusters.claimed)}


def _previous(context: ClusterContext, number: int, head: int) -> Int32[np.ndarray, " n"] | None:
    """Return a head's assignments of the round before, or None if it had fewer heads."""
    last = last_round_before(context.run, number)
    if last is None:
        return None
    assignments = read_assignments(context.run, last)
    return np.asarray(assignments[head]) if head < len(assignments) else None


def _check_collapse(statistics: dict[str, Any], max_share: float, round_dir: Path) -> None:
    share = statistics["largest_share"]
    if statistics["k"] > 1 and share > max_share:
        raise NumericalError(
            f"the clustering of {round_dir} has collapsed: one cluster holds {share:.1%} of the "
            f"images (cluster.max_share is {max_share:.0%}). The features no longer separate "
            "images: start a new run with a lower train.lr or more clusters, from an earlier "
            "checkpoint (init.weights) or from the beginning."
        )
