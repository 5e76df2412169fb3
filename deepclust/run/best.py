"""The best checkpoint of a run, by the labels that it was evaluated on while it was trained.

It lies in `best/STEP/` and has the files of `checkpoints/STEP`, as links where the file system has
them. So it stays when later checkpoints push that one out. Its manifest has the score. A new one
appears whole before the old one is deleted.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from deepclust.errors import RecipeError
from deepclust.files import read_record
from deepclust.run.checkpoint import Checkpoint, load
from deepclust.run.directory import Run, is_done, manifest, numbered, prune

PLACE = "best"
OWN = ("manifest.json", "DONE")  # of a stage, beside what it holds


@dataclass(frozen=True)
class Best:
    """Where the best checkpoint lies, its step and score, and a digest of what it was scored on."""

    folder: Path
    step: int
    top1: float
    data: str


def find_best(run: Run) -> Best | None:
    """Return the best checkpoint, or None for a run without one.

    Raises `DataError` for a manifest that is damaged.
    """
    kept = [_read(folder) for folder in numbered(run.path / PLACE) if is_done(folder)]
    return max(kept, key=lambda one: (one.top1, -one.step), default=None)


def keep_best(run: Run, step: int, top1: float, data: str) -> None:
    """Keep the checkpoint of a step as the best one, and delete the one before it."""
    source, folder = run.path / "checkpoints" / f"{step:08d}", run.path / PLACE / f"{step:08d}"
    files = manifest(source)["files"]
    hashes = {name: facts["blake2b"] for name, facts in files.items()}

    def fill(partial: Path) -> None:
        for name in files:
            _link(source / name, partial / name)

    run.commit(folder, fill, {"step": step}, hashes=hashes, top1=top1, scored_on=data)
    prune([other for other in numbered(run.path / PLACE) if other != folder], 0, run.alive)


def load_best(run: Run) -> Checkpoint:
    """Return the best checkpoint, or raise `RecipeError` for a run that has kept none."""
    best = find_best(run)
    if best is None:
        raise RecipeError(
            f"{run.path} has no best checkpoint: it was not evaluated while it was trained. Leave "
            '--best out, or train with train.evaluate="1 epoch"'
        )
    return Checkpoint(best.folder, *load(best.folder, alive=run.alive))


def _read(folder: Path) -> Best:
    fields = {"top1": (int, float), "scored_on": str}
    record = read_record(folder / "manifest.json", fields)
    return Best(folder, int(folder.name), float(record["top1"]), record["scored_on"])


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links
        shutil.copyfile(source, target)
