"""Bytes that a run takes: GPU memory of a rank, its readers, disk, and what a step sends."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.disk import Round, disk_of, rounds_of
from cluster_jobs.estimate.network import Network
from deepclust.recipe import Recipe

SLOTS = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers of an optimizer for each parameter
LIVE = 3  # outputs of layers that a pass without a backward has at a time
AHEAD = 4  # batches that are read, moved or waiting at a time
SQUARES = 4  # arrays of D x D that finding eigenvectors takes: covariance, vectors, two to work in
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
    written: float  # that all rounds write, with what they delete again
    centroids: float  # of all heads
    beside: float  # on the device of what clusters: a rank's networks, and the whitening's arrays
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
    low = 2.0 * network.trained * (number == 2)  # autocast's copies of the weights
    square = 8.0 * network.row**2 * (recipe.method.round is not None and recipe.method.round.whiten)
    checkpoint = 1.0 * network.saved + cost.per_sample * counts.samples
    slots = 4.0 * network.trained * SLOTS[train.optimizer]
    checkpoint += slots
    rounds = rounds_of(recipe, network, counts)
    largest = max(rounds, key=lambda one: one.rows, default=Round())
    disk, peak = disk_of(recipe, counts, rounds, checkpoint, slots, network.exported)
    return Sizes(
        gpu=state + activations + low + AHEAD * batch * 4,
        state=state,
        activations=activations,
        host=PROCESS + max(1, data.readers()) * READER + AHEAD * batch,
        disk=disk,
        disk_peak=peak,
        step_traffic=2 * 4.0 * (network.trained - network.owned) if train.ranks > 1 else 0.0,
        checkpoint=checkpoint,
        extraction=network.saved
        + 2 * square  # the moments, and a product that is added
        + data.extract_batch * (LIVE * network.largest * number + 3 * data.size**2 * 4),
        rows=largest.rows,
        written=sum(one.written for one in rounds),
        centroids=largest.centroids,
        beside=SQUARES * square + (state if recipe.clusters_inline else 0.0),
    )
