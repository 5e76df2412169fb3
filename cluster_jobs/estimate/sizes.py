"""Bytes that a run takes: GPU memory of a rank, its readers, disk, and what a step sends."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.network import Network
from deepclust.recipe import Recipe

SLOTS = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers of an optimizer for each parameter
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


def sizes(recipe: Recipe, network: Network, counts: Counts, classes: int) -> Sizes:
    """Return the bytes of a rank, and of the run directory."""
    train, data = recipe.train, recipe.data
    cost = recipe.cost(network.width)
    clusters = 0 if recipe.cluster is None else recipe.clustering.k
    kept = cost.per_sample * counts.samples + cost.per_cluster * clusters
    extra = (kept / (train.ranks if cost.sharded else 1)) + cost.fixed + cost.per_class * classes
    copies = 2 + SLOTS[train.optimizer]  # weights, gradients, the optimizer's
    teachers = sum(not one.trained for one in cost.passes[-1:])  # a slow copy of the network
    state = 4.0 * network.parameters * (copies + teachers) + extra
    part = train.batch / train.ranks / train.accumulate
    number = 4 if train.precision == "fp32" else 2
    crops = sum(kind.count * kind.size**2 * 3 for kind in recipe.method.crops(data))
    activations = part * network.activations * number
    batch = train.batch / train.ranks * crops
    checkpoint = 4.0 * network.parameters * (1 + teachers + SLOTS[train.optimizer]) + extra
    rows = 0.0 if not counts.extractions else 2.0 * counts.samples * _width(recipe, network)
    heads = 1 if recipe.method.round is None else recipe.method.round.heads
    ids = 8.0 * counts.samples * heads * counts.rounds  # assignments and distances
    disk = recipe.keep.checkpoints * checkpoint + recipe.keep.features * rows + ids
    raw = 2.0 * counts.samples * network.width if counts.extractions else 0.0
    return Sizes(
        gpu=state + activations + AHEAD * batch * 4,
        state=state,
        activations=activations,
        host=PROCESS + max(1, data.workers) * READER + AHEAD * batch,
        disk=disk,
        disk_peak=disk + checkpoint + rows + raw,
        step_traffic=2 * 4.0 * network.parameters if train.ranks > 1 else 0.0,
    )


def _width(recipe: Recipe, network: Network) -> int:
    """Return the numbers of a row of features on disk."""
    refresh = recipe.method.round
    whitened = refresh is not None and refresh.whiten and recipe.cluster is not None
    return recipe.clustering.dim if whitened else network.width
