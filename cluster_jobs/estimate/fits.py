"""Which stage does not fit, and the key that makes it fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster_jobs.estimate.sizes import Sizes
from deepclust.recipe import Recipe

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Room:
    """Bytes that there are; None where nothing is known of them."""

    name: str
    device: float | None = None
    host: float | None = None
    disk: float | None = None


def here() -> Room:
    """Return the memory that is free on this machine, and the space of this folder."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024.0
    return Room("this machine", host=free, disk=float(shutil.disk_usage(Path.cwd()).free))


def misfits(recipe: Recipe, made: Sizes, room: Room) -> list[str]:
    """Return a sentence for each stage that does not fit."""
    texts = []
    if room.device is not None:
        texts += [_training(recipe, made, room.name, room.device)]
        texts += [_extraction(recipe, made, room.name, room.device)]
        texts += [_clustering(recipe, made, room.name, room.device)]
    if room.host is not None and made.memory > room.host:
        texts.append(
            f"training needs {_gb(made.memory)} of memory and {_gb(room.host)} are free on "
            f"{room.name}: {_less_memory(recipe)}"
        )
    if room.disk is not None and made.disk_peak > room.disk:
        texts.append(
            f"the run directory needs {_gb(made.disk_peak)} and {_gb(room.disk)} are free here: "
            "keep.checkpoints=1 keep.features=0, or a --run on a larger disk"
        )
    return [text for text in texts if text]


def _training(recipe: Recipe, made: Sizes, name: str, room: float) -> str:
    """Return what makes a step fit: smaller parts of a batch, or more ranks."""
    if made.gpu <= room:
        return ""
    text = f"training needs {_gb(made.gpu)} of the {name}'s {_gb(room)}"
    parts = recipe.train.accumulate
    while 2 * parts * recipe.train.ranks <= recipe.train.batch:
        parts *= 2
        if made.gpu - made.activations * (1 - recipe.train.accumulate / parts) <= room:
            break
    else:
        return f"{text}: choose a smaller backbone or train.batch"
    if recipe.method.whole_batch:  # its loss needs the batch in one part
        ranks = recipe.train.ranks * parts // recipe.train.accumulate
        return f"{text}: train.ranks={ranks} makes it fit"
    return f"{text}: train.accumulate={parts} makes it fit"


def _extraction(recipe: Recipe, made: Sizes, name: str, room: float) -> str:
    if not recipe.assigns or made.extraction <= room:
        return ""
    batch = max(1, int(recipe.data.extract_batch * room / made.extraction))
    need = f"extraction needs {_gb(made.extraction)} of the {name}'s {_gb(room)}"
    return f"{need}: data.extract_batch={batch} makes it fit"


def _clustering(recipe: Recipe, made: Sizes, name: str, room: float) -> str:
    """Return how rows that do not stay on the GPU do: they are read from disk in every pass."""
    if recipe.cluster is None:
        return ""
    ranks = recipe.train.ranks if recipe.cluster.where == "ranks" else 1
    if made.rows / ranks + made.centroids <= room:
        return ""
    text = f"clustering has {_gb(made.rows / ranks)} of rows for the {name}'s {_gb(room)}, and "
    text += "reads the rest in every pass"
    if ranks == 1 and recipe.train.ranks > 1 and made.rows / recipe.train.ranks <= room:
        return f"{text}: cluster.where=ranks makes it fit"
    return f"{text}: a smaller cluster.dim makes it fit"


def _less_memory(recipe: Recipe) -> str:
    workers = recipe.data.readers()
    return f"data.workers={workers // 2}" if workers > 1 else "choose a smaller train.batch"


def _gb(count: float) -> str:
    return f"{count / 1e9:.0f} GB" if count >= 1e10 else f"{count / 1e9:.1f} GB"
