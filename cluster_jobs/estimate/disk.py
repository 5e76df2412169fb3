"""Bytes of a run directory: at its end, and at most, which is while a round is made.

A round leaves assignments and centroids. Its features stay for `keep.features` rounds. What the
extraction has written is deleted when the round is clustered.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.network import Network
from deepclust.recipe import Recipe
from deepclust.recipe.declare import Refresh
from deepclust.stages.extract import CHUNKS, LARGEST_CHUNK, SMALLEST_CHUNK


@dataclass(frozen=True)
class Round:
    """Bytes: rows that are clustered, what the extraction leaves, what is kept, all centroids."""

    rows: float = 0.0
    raw: float = 0.0
    kept: float = 0.0
    centroids: float = 0.0

    @property
    def written(self) -> float:
        """All that the round writes."""
        return self.rows + self.raw + self.kept


def rounds_of(recipe: Recipe, network: Network, counts: Counts) -> list[Round]:
    """Return the rounds of a run in order, with the final one.

    A bank has several rows of an image, and is extracted for the first round and the final one.
    """
    refresh = recipe.method.round
    if refresh is None or recipe.cluster is None:
        return []
    extracted = _extracted(recipe, refresh, network, counts)
    made = [extracted] * counts.rounds
    inner = range(1, counts.rounds - int(recipe.cluster.final))
    if refresh.source == "bank":
        rows = 2.0 * counts.samples * network.row * recipe.method.full_crops
        for number in inner:
            made[number] = Round(rows, 0.0, extracted.kept, extracted.centroids)
    if refresh.first == "balanced" and made:  # drawn, without a row
        made[0] = Round(0.0, 0.0, extracted.kept, extracted.centroids)
    return made


def _extracted(recipe: Recipe, refresh: Refresh, network: Network, counts: Counts) -> Round:
    """Return a round that is extracted: rows of 2 bytes a number, moments of 8, others of 4."""
    n, wide = counts.samples, network.row
    dim = recipe.clustering.dim if refresh.whiten else wide
    chunks = max(1, min(CHUNKS, n // SMALLEST_CHUNK), -(-n // LARGEST_CHUNK))
    # the outer product without what its symmetry gives (`Moments.packed`), the pivot and the sum
    moments = 8.0 * chunks * wide * (9 / 16 * wide + 2) * refresh.whiten
    centroids = 4.0 * (recipe.clustering.k + recipe.clustering.supers) * dim * refresh.heads
    scorers = 2 if refresh.kind == "sinkhorn" else 1  # their weights lie beside the centroids
    whitening = 4.0 * wide * (dim + 2) * refresh.whiten
    ids = 8.0 * n * refresh.heads  # assignments and distances
    kept = ids + scorers * centroids + whitening
    return Round(2.0 * n * dim, 2.0 * n * wide + moments, kept, centroids)


def disk_of(
    recipe: Recipe, counts: Counts, rounds: list[Round], checkpoint: float, slots: float, out: float
) -> tuple[float, float]:
    """Return the bytes at the end, and at most.

    `slots` of a checkpoint are the optimizer's, which the one before the first step lacks: it is
    saved for the first round. `out` is what is exported.
    """
    keep = recipe.keep
    bare = bool(rounds) and counts.checkpoints <= keep.checkpoints
    known = min(keep.checkpoints, counts.checkpoints) + (counts.evaluations > 0)  # one is the best
    fixed = known * checkpoint - slots * bare + out
    fixed += sum(one.kept for one in rounds)
    rows = [one.rows for one in rounds]
    held = [sum(rows[max(0, i - keep.features) : i]) for i in range(len(rows) + 1)]
    making = [before + one.rows + one.raw for before, one in zip(held, rounds, strict=False)]
    end = fixed + held[-1]
    # a checkpoint that is written is beside the oldest one that is kept, before the export
    beside = checkpoint - out if counts.checkpoints > keep.checkpoints else 0.0
    return end, max(end + max(0.0, beside), fixed + max(making, default=0.0))
