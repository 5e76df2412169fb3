"""What each stage takes: seconds, memory of a rank, bytes written, and bytes between machines."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.sizes import Sizes
from deepclust.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One stage of the whole run: `device` and `host` are bytes at its peak, the others in all."""

    name: str
    seconds: float
    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    network: float = 0.0


def stages(
    recipe: Recipe, counts: Counts, sizes: Sizes, seconds: dict[str, float], images: float
) -> list[Stage]:
    """Return the stages that take `seconds`.

    `images` are the bytes of all images. They count as network where the shards are behind a URL.
    """
    ranks, host = recipe.train.ranks, sizes.host
    remote = images if _is_remote(recipe) else 0.0
    together = recipe.cluster is not None and recipe.cluster.where == "ranks"
    share = sizes.rows / (ranks if together else 1)
    passes = counts.rounds * counts.iterations
    taken = {
        "extraction": (
            sizes.extraction, host, sizes.written,
            counts.extractions * remote,
        ),
        "clustering": (
            share + sizes.centroids + sizes.beside, share, 0.0,
            passes * sizes.centroids * ranks * together,
        ),
        "training": (
            sizes.gpu, host, 0.0,
            counts.steps * (sizes.step_traffic * ranks + remote * _share(recipe, counts)),
        ),
        "evaluation": (
            sizes.extraction, host, 0.0,
            counts.evaluations * remote * min(1.0, counts.evaluated / counts.samples),
        ),
        "checkpoints": (sizes.gpu, host, counts.checkpoints * sizes.checkpoint, 0.0),
    }  # fmt: skip
    return [Stage(name, took, *taken.get(name, ())) for name, took in seconds.items()]


def _share(recipe: Recipe, counts: Counts) -> float:
    """Return the part of all images that a step reads."""
    return recipe.train.batch / counts.samples


def _is_remote(recipe: Recipe) -> bool:
    given = recipe.data.shards
    return any("://" in one for one in ([given] if isinstance(given, str) else given))
