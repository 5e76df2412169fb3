"""The reports of runs, which are kept until a run changes: a large one takes many seconds."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

from cluster_jobs.report import write_report
from cluster_jobs.web.folder import facts_of
from deepclust.run.directory import Run

MOST_KEPT = 4  # of at most some 15 MB each

Stamp = tuple[tuple[str, int, int], ...]


class Reports:
    """The pages that were asked last; one is written at a time, since it reads many images."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[Stamp, str]] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, run: Run) -> str:
        """Return the report of a run as HTML: written again where a file of the run has changed."""
        with self._lock:
            stamp = _stamp(run.path)
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


def _stamp(folder: Path) -> Stamp:
    """Return what changes with the files of a run, which come and go while it is made."""
    paths = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return tuple(sorted((path, *facts_of(path)) for path in paths))
