"""Bytes that a run takes: GPU memory of a rank, its readers, disk, and what a step sends."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.network import Network
from deepclust.recipe import Recipe
from deepclust.stages.extract import CHUNKS, LARGEST_CHUNK, SMALLEST_CHUNK

SLOTS = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers of an optimizer for each parameter
LIVE = 3  # outputs of layers that a pass without a backward has at a time
AHEAD = 4  # batches that are read, moved or waiting at a time
READER = 300e6  # bytes of a reader process, most of it torch's libraries
PROCESS = 1.0e9  # of a rank without images


@dataclass(frozen=True)
class Sizes:
    """Bytes. `gpu` is the peak of a rank: its state and activations."""

    gpu: float
    state: float
    activations: float
    host: float  # of a rank with its readers
    disk: float  # at the end of a run
    disk_peak: float  # with a round's raw features beside it
    step_traffic: float  # sent by a rank in a step
    checkpoint: float  # on disk
    extraction: float  # on the device of a rank
    rows: float  # of a round, as they are clustered
    round_disk: float  # that a round writes, with what it deletes again
    centroids: float  # of all heads
    memory: float = 0.0  # of all processes on a CPU, or beside the GPUs


def sizes(recipe: Recipe, network: Network, counts: Counts) -> Sizes:
    """Return the bytes of a rank, and of the run directory."""
    train, data = recipe.train, recipe.data
    cost = recipe.cost(network.width)
    bank = cost.per_sample * counts.samples / (train.ranks if cost.sharded else 1)
    elsewhere = network.owned * (1 - 1 / train.ranks)  # in other ranks
    state = network.saved - 4.0 * elsewhere + bank
    state += 4.0 * (network.trained - elsewhere) * (1 + SLOTS[train.optimizer])
    part = train.batch / train.ranks / train.accumulate
    number = 4 if train.precision == "fp32" else 2
    crops = sum(kind.count * kind.size**2 * 3 for kind in recipe.method.crops(data))
    activations = part * network.activations * number
    batch = train.batch / train.ranks * crops
    checkpoint = 1.0 * network.saved + cost.per_sample * counts.samples
    checkpoint += 4.0 * network.trained * SLOTS[train.optimizer]
    round_ = _round(recipe, network, counts)
    saved = min(recipe.keep.checkpoints, counts.checkpoints)
    disk = saved * checkpoint + 4.0 * network.parameters  # and the export
    disk += recipe.keep.features * round_.rows + counts.rounds * round_.kept
    return Sizes(
        gpu=state + activations + AHEAD * batch * 4,
        state=state,
        activations=activations,
        host=PROCESS + max(1, data.readers()) * READER + AHEAD * batch,
        disk=disk,
        disk_peak=disk + max(checkpoint, round_.rows + round_.raw),
        step_traffic=2 * 4.0 * (network.trained - network.owned) if train.ranks > 1 else 0.0,
        checkpoint=checkpoint,
        extraction=4.0 * network.parameters
        + data.extract_batch * (LIVE * network.largest * number + 3 * data.size**2 * 4),
        rows=round_.rows,
        round_disk=round_.rows + round_.raw + round_.kept,
        centroids=round_.centroids,
    )


@dataclass(frozen=True)
class _Round:
    """Bytes of a round: rows that are clustered, what the extraction leaves, and what is kept."""

    rows: float = 0.0
    raw: float = 0.0
    kept: float = 0.0
    centroids: float = 0.0


def _round(recipe: Recipe, network: Network, counts: Counts) -> _Round:
    """Return the bytes of a round: numbers of 2, centroids of 4, moments of 8."""
    refresh, cluster = recipe.method.round, recipe.cluster
    if refresh is None or cluster is None:
        return _Round()
    whitened, wide, n = refresh.whiten, network.width, counts.samples
    dim = cluster.dim if whitened else wide
    ids = 8.0 * n * refresh.heads  # assignments and distances
    centroids = 4.0 * cluster.k * dim * refresh.heads
    kept = ids + centroids + 4.0 * wide * (dim + 1) * whitened
    if not counts.extractions:
        return _Round(2.0 * n * dim, 0.0, kept, centroids)
    chunks = max(1, min(CHUNKS, n // SMALLEST_CHUNK), -(-n // LARGEST_CHUNK))
    return _Round(2.0 * n * dim, 2.0 * n * wide + 8.0 * chunks * wide**2, kept, centroids)
