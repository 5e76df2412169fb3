"""The reports of runs, which are kept until a run changes: a large one takes many seconds."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from cluster_jobs.report import write_report
from deepclust.run.directory import Run

MOST_KEPT = 4  # of at most some 15 MB each
DEPTH = 3  # folders below the run that are looked into: those of a stage are below rounds/N

Stamp = tuple[tuple[str, int, int], ...]


class Reports:
    """The pages that were asked last; one is written at a time, since it reads many images."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[Stamp, str]] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, run: Run) -> str:
        """Return the report of a run as HTML: written again where a file of the run has changed."""
        with self._lock:
            stamp = tuple(sorted(_files(run.path, DEPTH)))
            known = self._known.pop(run.path, None)
            if known is None or known[0] != stamp:
                known = stamp, _written(run)
            self._known[run.path] = known
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
            return known[1]


def _written(run: Run) -> str:
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        return write_report(run.path, Path(folder) / "report.html").read_text("utf-8")


def _files(folder: Path | os.DirEntry[str], depth: int) -> Iterator[tuple[str, int, int]]:
    """Yield the path, time and size of all that is in a folder, so many folders deep."""
    with os.scandir(folder) as entries:
        for entry in entries:
            seen = entry.stat(follow_symlinks=False)
            yield entry.path, seen.st_mtime_ns, seen.st_size
            if depth and entry.is_dir(follow_symlinks=False):
                yield from _files(entry, depth - 1)
