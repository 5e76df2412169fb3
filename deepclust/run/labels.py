"""The file `labels.json` of a run: which labels its batches hold, and their classes' names."""

from __future__ import annotations

from dataclasses import dataclass

from deepclust.files import read_record, write_json
from deepclust.run.directory import Run

FILE = "labels.json"


@dataclass(frozen=True)
class Labels:
    """The digest of a run's labels, and the names of the classes by their numbers.

    Runs of older versions did not keep the names.
    """

    digest: str
    classes: tuple[str, ...]


def write(run: Run, digest: str, count: int, classes: list[str]) -> None:
    """Keep what a later process of the run compares its labels with."""
    write_json(run.path / FILE, {"digest": digest, "count": count, "classes": classes})


def read(run: Run) -> Labels | None:
    """Return what the run began with, None where batches hold no labels."""
    file = run.path / FILE
    if not file.exists():
        return None
    record = read_record(file, {"digest": str})
    return Labels(record["digest"], tuple(map(str, record.get("classes", ()))))


def class_names(run: Run) -> tuple[str, ...]:
    """Return the names of the classes that a run's method was built for."""
    kept = read(run)
    return () if kept is None else kept.classes
