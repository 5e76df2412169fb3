"""GPUs by name: published figures, and the shares of them that we assume, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.network import Network
from cluster_jobs.estimate.speeds import Speeds
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe

COMPUTE, PRODUCTS, MEMORY = 0.25, 0.25, 0.25  # shares of the peaks: networks, k-means, bandwidth
FORWARD, BACKWARD = 2, 3  # times that a layer's bf16 output crosses the memory
READER = 300.0  # images a second that one reader decodes and crops, 500 x 375 pixels
LINK = 20e9  # bytes a second between ranks: of a slow node, its gradients once a step
DISK = 1e9  # bytes a second of a checkpoint
START, ROUND = 60.0, 30.0  # seconds


@dataclass(frozen=True)
class Device:
    """A GPU as published: dense bf16 operations a second, bytes of memory, bytes a second."""

    name: str
    peak: float
    memory: float
    bandwidth: float


DEVICES = {
    one.name: one
    for one in (
        Device("h200", 989e12, 141e9, 4.8e12),
        Device("h100", 989e12, 80e9, 3.35e12),
        Device("a100", 312e12, 80e9, 2.04e12),
        Device("l40s", 362e12, 48e9, 0.864e12),
        Device("v100", 125e12, 32e9, 0.9e12),  # fp16: it has no bf16
    )
}


def device_of(name: str) -> Device:
    """Return a device by its name, or raise `RecipeError` with those that are known."""
    if name not in DEVICES:
        raise RecipeError(f"--device {name!r} is not known: choose from {', '.join(DEVICES)}")
    return DEVICES[name]


def speeds_of(device: Device, recipe: Recipe, network: Network, counts: Counts) -> Speeds:
    """Return the speeds of `train.ranks` such devices, with what is assumed."""
    ranks, workers = recipe.train.ranks, recipe.data.readers()
    readers = ranks * max(1, workers) * READER
    crossed = 2 * (FORWARD + BACKWARD) * network.activations
    compute = ranks / _seconds(device, network.step_flops, crossed)
    exchange = 2 * 4 * (network.trained - network.owned) * (ranks > 1) / LINK
    batch = recipe.train.batch
    forward = ranks / _seconds(device, network.extract_flops, 2 * FORWARD * network.outputs)
    dim = recipe.clustering.dim if recipe.cluster is not None else 1
    return Speeds(
        start=START,
        trained=min(readers, batch / (batch / compute + exchange)),
        extracted=min(readers, forward),
        evaluated=min(readers, forward),
        row=sum(counts.pairs) * counts.iterations * 2 * dim / (device.peak * PRODUCTS),
        round=ROUND,
        checkpoint=(network.saved + 4 * 2 * network.trained) / DISK,
        assumptions=[
            f"{ranks} x {device.name}: the slower of {COMPUTE:.0%} of {device.peak / 1e12:.0f} "
            f"TFLOP/s and {MEMORY:.0%} of {device.bandwidth / 1e12:.1f} TB/s",
            f"k-means at {PRODUCTS:.0%}, {max(1, workers)} readers a rank with {READER:.0f} "
            f"images/s each, {LINK / 1e9:.0f} GB/s between ranks, {DISK / 1e9:.0f} GB/s to disk",
            "none of it measured; calibrate on one node: deepclust estimate without --device",
        ],
    )


def _seconds(device: Device, flops: float, crossed: float) -> float:
    """Return the seconds of an image: of its operations, or of the bytes that cross the memory."""
    return max(flops / (device.peak * COMPUTE), crossed / (device.bandwidth * MEMORY))
