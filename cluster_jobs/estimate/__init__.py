"""What a job costs before it runs: seconds, GPU-hours, memory, disk and network, by stage.

Counts come from the recipe and the index (`counts.py`), the network's size from a pass of
one image (`network.py`). Seconds come from a short run of the same recipe on this machine
(`calibrate.py`). For a named device they come from published figures (`devices.py`), with every
assumption in the answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cluster_jobs.estimate.calibrate import calibrate
from cluster_jobs.estimate.counts import Counts, count
from cluster_jobs.estimate.devices import Device, speeds_of
from cluster_jobs.estimate.network import Network, measure
from cluster_jobs.estimate.sizes import Sizes, sizes
from cluster_jobs.estimate.speeds import Speeds
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, bytes by place, what they are computed from, and what will not fit."""

    counts: Counts
    network: Network
    seconds: dict[str, float]
    sizes: Sizes
    ranks: int
    gpus: int
    assumptions: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds from the command to the end."""
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        """GPUs that are held, times hours."""
        return self.gpus * self.total / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {**asdict(self), "total_seconds": self.total, "gpu_hours": self.gpu_hours}


def estimate(recipe: Recipe, source: Index | int, device: Device | None) -> Estimate:
    """Return what a recipe takes over the images of an index, or over so many.

    Without a device, a short run measures this machine, which needs the images themselves.

    Raises `RecipeError` and `DataError` as a run would at its start.
    """
    usable = source if isinstance(source, int) else len(source) - len(source.excluded)
    network, counts = measure(recipe), count(recipe, usable)
    classes = 0 if isinstance(source, int) else len(source.class_names or ())
    made = sizes(recipe, network, counts, classes)
    if device is not None:
        speeds = speeds_of(device, recipe, network, counts)
    elif isinstance(source, int):
        raise RecipeError("--samples needs --device: only images can measure this machine")
    else:
        speeds = calibrate(recipe, source)
    on_gpu = device is not None or torch.cuda.is_available()
    return Estimate(
        counts=counts,
        network=network,
        seconds=seconds(recipe, counts, speeds),
        sizes=made,
        ranks=recipe.train.ranks,
        gpus=recipe.train.ranks + (0 if recipe.clusters_inline else 1) if on_gpu else 0,
        assumptions=speeds.assumptions,
        warnings=[] if device is None else _too_large(recipe, made, device),
    )


def seconds(recipe: Recipe, counts: Counts, speeds: Speeds) -> dict[str, float]:
    """Return the seconds of each stage, without those that a recipe does not have."""
    pairs = counts.samples * sum(counts.pairs)  # rows times centroids, of one iteration
    taken = {
        "start": speeds.start,
        "extraction": counts.extractions * counts.samples / speeds.extracted,
        "clustering": counts.rounds * (speeds.round + pairs * counts.iterations / speeds.pairs),
        "training": counts.steps * recipe.train.batch / speeds.trained,
        "checkpoints": counts.checkpoints * speeds.checkpoint,
    }
    if not counts.rounds:
        del taken["clustering"]
    if not counts.extractions:
        del taken["extraction"]
    return taken


def _too_large(recipe: Recipe, made: Sizes, device: Device) -> list[str]:
    """Return a sentence for what does not fit into the GPU, with the key that makes it fit."""
    if made.gpu <= device.memory:
        return []
    text = f"training needs {made.gpu / 1e9:.0f} GB of the {device.name}'s "
    text += f"{device.memory / 1e9:.0f} GB"
    parts = recipe.train.accumulate
    while 2 * parts * recipe.train.ranks <= recipe.train.batch:
        parts *= 2
        if made.gpu - made.activations * (1 - recipe.train.accumulate / parts) <= device.memory:
            break
    else:
        return [f"{text}: choose a smaller backbone or train.batch"]
    if recipe.method.whole_batch:  # its loss needs the batch in one part
        ranks = recipe.train.ranks * parts // recipe.train.accumulate
        return [f"{text}: train.ranks={ranks} makes it fit"]
    return [f"{text}: train.accumulate={parts} makes it fit"]


__all__ = ["Estimate", "estimate", "seconds"]
