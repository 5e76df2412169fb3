"""What a job costs before it runs: seconds, GPU-hours, memory, disk and network, by stage.

Counts come from the recipe and the index (`counts.py`), the network's size from a pass of
one image (`network.py`). Seconds come from a short run of the same recipe on this machine
(`calibrate.py`). For a named device they come from published figures (`devices.py`), with every
assumption in the answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster_jobs.estimate.counts import Counts, count
from cluster_jobs.estimate.speeds import Speeds, seconds
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe

if TYPE_CHECKING:
    from cluster_jobs.estimate.devices import Device
    from cluster_jobs.estimate.network import Network
    from cluster_jobs.estimate.sizes import Sizes
    from cluster_jobs.estimate.stages import Stage
    from deepclust.data.shards.index import Index


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, bytes by place, what they are computed from, and what will not fit."""

    counts: Counts
    network: Network
    seconds: dict[str, float]
    sizes: Sizes
    stages: list[Stage]
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

    Without a device, a short run measures this machine, which needs the images themselves. Its
    speeds are kept for the line that a run prints at its start.

    Raises `RecipeError` and `DataError` as a run would at its start.
    """
    import torch

    from cluster_jobs.estimate.fits import Room, here, misfits
    from cluster_jobs.estimate.network import measure
    from cluster_jobs.estimate.sizes import sizes
    from cluster_jobs.estimate.stages import stages

    usable = source if isinstance(source, int) else len(source) - len(source.excluded)
    classes = 0 if isinstance(source, int) else len(source.class_names or ())
    network, counts = measure(recipe, classes), count(recipe, usable)
    made = sizes(recipe, network, counts)
    speeds = _speeds(recipe, source, device, network, counts)
    beside = recipe.train.ranks * made.host if speeds.memory is None else speeds.memory
    made = replace(made, memory=beside)
    on_gpu = device is not None or torch.cuda.is_available()
    taken = seconds(recipe, counts, speeds)
    room = here() if device is None else Room(device.name, device=device.memory)
    return Estimate(
        counts=counts,
        network=network,
        seconds=taken,
        sizes=made,
        stages=stages(recipe, counts, made, taken, _image_bytes(source)),
        ranks=recipe.train.ranks,
        gpus=_gpus(recipe) if on_gpu else 0,
        assumptions=speeds.assumptions,
        warnings=misfits(recipe, made, room),
    )


def _speeds(
    recipe: Recipe, source: Index | int, device: Device | None, network: Network, counts: Counts
) -> Speeds:
    """Return the speeds of a named device, or those of this machine, which are kept."""
    if device is not None:
        from cluster_jobs.estimate.devices import speeds_of

        return speeds_of(device, recipe, network, counts)
    if isinstance(source, int):
        raise RecipeError("--samples needs --device: only images can measure this machine")
    from cluster_jobs.estimate.calibrate import calibrate
    from cluster_jobs.estimate.kept import keep

    speeds = calibrate(recipe, source)
    keep(recipe, speeds)
    return speeds


def _gpus(recipe: Recipe) -> int:
    """Return the GPUs that are held: one for each rank, and those of a cluster worker."""
    return recipe.train.ranks + (0 if recipe.clusters_inline else recipe.clustering.gpus)


def _image_bytes(source: Index | int) -> float:
    """Return the bytes of all images: of a number of them, 110 kB each, as ImageNet's."""
    return source * 110e3 if isinstance(source, int) else float(source.sizes.sum())


__all__ = ["Estimate", "estimate", "seconds"]
