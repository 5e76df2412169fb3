"""The runs of a folder by name, and their status, which is read again when its files change.

A name leads to a folder in the folder, never out of it. A run with a link out of itself is not
shown, because the server would read what the link names for anyone with the token.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster_jobs.executors import executor_of
from cluster_jobs.status import Jobs, Status, find_runs, status
from cluster_jobs.web.answers import NotThereError
from deepclust.errors import RecipeError
from deepclust.files import path_of
from deepclust.run import directory
from deepclust.run.directory import Run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a run that is made here
WATCHED = ("", "recipe.yaml", "events.jsonl", "metrics.jsonl", "rounds")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED", "DIED")
SORTS = ("name", "state", "epoch", "loss", "nmi_labels", "images_per_s")
FRESH_S = 2.0  # how old the status of a run may be that goes on

Stamp = tuple[int, ...]


class Runs:
    """The runs in a folder, or the one that the folder is."""

    def __init__(self, folder: Path) -> None:
        find_runs(folder)  # raises where there is not a folder
        self.root = Path(os.path.realpath(folder))
        self.is_run = directory.exists(self.root)
        self._known: dict[str, tuple[Stamp, float, Status]] = {}
        self._reading: dict[str, threading.Lock] = {}

    def run(self, name: str) -> Run:
        """Return a run by its name, or raise `NotThereError`."""
        path = self._path(name)
        if path is None or not directory.exists(path):
            raise NotThereError(f"there is no run {name[:100]!r}")
        if link := link_out(path):
            raise NotThereError(f"{name} is not shown: {link} is a link that leads out of the run")
        return Run(path)

    def new(self, name: str) -> Path:
        """Return the path of a run to be made, or raise `RecipeError`."""
        if self.is_run:
            raise RecipeError(f"{self.root} is a run: serve a folder of runs to submit others")
        if not NAME.fullmatch(name):
            raise RecipeError(
                f"{name[:100]!r} cannot name a run: take letters, digits, '.', '_' and '-'"
            )
        if os.path.lexists(self.root / name):
            raise RecipeError(f"there is a run {name!r} already: choose another name")
        return path_of(str(self.root / name), "run")

    def _path(self, name: str) -> Path | None:
        if self.is_run:
            return self.root if name == self.root.name else None
        path = self.root / name
        try:
            fits = 0 < len(os.fsencode(name)) < 256
            plain = fits and not {"/", "\0"} & {*name} and not name.startswith(".")
            return path if plain and os.path.realpath(path) == str(path) else None
        except (OSError, ValueError):  # a name too long, or not of this file system
            return None

    def every(self, text: str = "") -> list[Run]:
        """Return the runs with a text in their name, sorted, without links to folders."""
        runs = [run for run in find_runs(self.root) if self.is_run or not run.path.is_symlink()]
        names = {run.path.name for run in runs}
        for gone in [name for name in list(self._known) if name not in names]:
            self._known.pop(gone, None)
            self._reading.pop(gone, None)
        return [run for run in runs if text.lower() in run.path.name.lower()]

    def page(
        self, state: str, text: str, offset: int, limit: int, sort: str = "name", down: bool = False
    ) -> tuple[int, list[Status]]:
        """Return how many runs are in a state ("": any), and the status of those of a page.

        By name and without a state only those of the page are read.
        """
        if sort not in SORTS:
            raise RecipeError(f"sort is one of {', '.join(SORTS)}, not {sort[:50]!r}")
        runs = self.every(text)
        if not state and sort == "name":
            runs = runs[::-1] if down else runs
            return len(runs), self._statuses(runs[offset : offset + limit])
        chosen = [one for one in self._statuses(runs) if not state or one.state == state.upper()]
        chosen = ordered(chosen, sort, down)
        return len(chosen), chosen[offset : offset + limit]

    def _statuses(self, runs: list[Run]) -> list[Status]:
        jobs = Jobs([run.path for run in runs])
        return [self.status(run, jobs) for run in runs]

    def status(self, run: Run, jobs: Jobs | None = None) -> Status:
        """Return the status of a run: as it was, where nothing has changed since it ended.

        Of a run that goes on it is read every FRESH_S, by one of those who ask.
        """
        name = run.path.name
        known = self._known.get(name)
        if known is not None and self._is_fresh(run, *known):
            return known[2]
        with self._reading.setdefault(name, threading.Lock()):
            known = self._known.get(name)
            if known is not None and self._is_fresh(run, *known):
                return known[2]
            stamp = stamp_of(run.path)
            state = self._read(run, jobs)
            self._known[name] = stamp, time.monotonic(), state
            return state

    def _is_fresh(self, run: Run, stamp: Stamp, read: float, state: Status) -> bool:
        if state.state in ENDED:
            return stamp == stamp_of(run.path)
        return time.monotonic() - read < FRESH_S

    def is_over(self, run: Run) -> bool:
        """Return whether a run has ended, or nobody is known who would start it."""
        now = self.status(run)
        if now.state == "PENDING" and now.owner is None:
            job = executor_of(run.path).state(run.path)
            return job is None
        return now.state in ENDED

    def _read(self, run: Run, jobs: Jobs | None) -> Status:
        try:
            link = link_out(run.path)
        except OSError:  # of another user: the status says so
            link = None
        if link:
            return Status(run.path.name, "FAILED", "", 0, reason=f"{link} leads out of the run")
        return status(run, jobs)


def ordered(states: list[Status], sort: str, down: bool) -> list[Status]:
    """Return runs sorted by a field, those without a value last in either direction."""
    known = [one for one in states if not _lacks(getattr(one, sort))]
    known.sort(key=lambda one: getattr(one, sort), reverse=down)
    return known + [one for one in states if _lacks(getattr(one, sort))]


def _lacks(value: object) -> bool:
    return value is None or value != value


def stamp_of(run_dir: Path) -> Stamp:
    """Return times and sizes that change when a run's status does."""
    base = str(run_dir)  # a Path of each file would take longer than to look at it
    return tuple(part for name in WATCHED for part in facts_of(f"{base}/{name}"))


def facts_of(path: str) -> tuple[int, int]:
    """Return the time and the size of a file, zeros where it is gone."""
    try:
        seen = os.stat(path, follow_symlinks=False)
    except OSError:
        return 0, 0
    return seen.st_mtime_ns, seen.st_size


def link_out(run_dir: Path) -> Path | None:
    """Return a link in a run that leads out of it, to a file or a folder, or None."""
    inside = os.path.realpath(run_dir)
    for link in _links(inside):
        if os.path.commonpath([inside, os.path.realpath(link)]) != inside:
            return Path(link)
    return None


def _links(folder: str) -> Iterator[str]:
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
