"""The file `labels.json` of a run: which labels its batches hold, and their classes' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepclust.files import fits, read_record, write_json
from deepclust.run.directory import Run

FILE = "labels.json"


@dataclass(frozen=True)
class Labels:
    """The digest of a run's labels, the names of the classes by their numbers, and their labels.

    Runs of older versions did not keep the names, or how many labels each class has.
    """

    digest: str
    classes: tuple[str, ...]
    counts: tuple[int, ...] | None = None


def write(run: Run, digest: str, counts: Sequence[int], classes: Sequence[str]) -> None:
    """Keep what a later process of the run compares its labels with.

    `counts` are the labels of each class.
    """
    each = [int(count) for count in counts]
    record = {"digest": digest, "count": sum(each), "classes": [*classes], "counts": each}
    write_json(run.path / FILE, record)


def read(run: Run) -> Labels | None:
    """Return what the run began with, None where batches hold no labels."""
    file = run.path / FILE
    if not file.exists():
        return None
    record = read_record(file, {"digest": str})
    classes, counts = tuple(map(str, record.get("classes", ()))), record.get("counts")
    if not isinstance(counts, list) or not all(fits(count, int) for count in counts):
        counts = []
    return Labels(record["digest"], classes, tuple(counts) if counts else None)


def class_names(run: Run) -> tuple[str, ...]:
    """Return the names of the classes that a run's method was built for."""
    kept = read(run)
    return () if kept is None else kept.classes
