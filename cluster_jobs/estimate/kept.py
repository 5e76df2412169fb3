"""Calibrations that this user has made, so that a run can say at its start how long it may take.

A file of the user's cache for each machine and kind of work. The kind is the recipe without what
changes neither the work for an image nor for a row: where the images are, epochs, seed, places.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, fields
from pathlib import Path

from cluster_jobs.estimate.speeds import Speeds
from deepclust.errors import DiskError
from deepclust.files import write_json
from deepclust.recipe import Recipe

FREE = (  # keys that leave the work for an image as it is
    "data.shards", "data.index", "train.epochs", "seed", "init", "keep", "ray", "slurm",
    "cluster.every", "cluster.until", "cluster.final", "train.checkpoint", "train.log",
    "train.threads", "train.evaluate", "train.restarts", "train.hang", "train.timeout", "notify",
    "track",
)  # fmt: skip


def keep(recipe: Recipe, speeds: Speeds) -> None:
    """Keep the speeds of this machine; a home that cannot be written keeps none."""
    record = {"time": time.time(), "speeds": asdict(speeds)}
    with contextlib.suppress(OSError, DiskError):
        file = _file(recipe)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(file, record)


def kept(recipe: Recipe) -> tuple[Speeds, float] | None:
    """Return the speeds of this machine and when they were measured, or None of other work."""
    try:
        record = json.loads(_file(recipe).read_text())
        values = {field.name: record["speeds"][field.name] for field in fields(Speeds)}
        return Speeds(**values), float(record["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(recipe: Recipe) -> Path:
    same = {key: value for key, value in recipe.flat().items() if not key.startswith(FREE)}
    work = {"recipe": same, "machine": platform.node(), "cores": os.cpu_count()}
    text = json.dumps(work, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "deepclust" / "speeds" / f"{digest}.json"
