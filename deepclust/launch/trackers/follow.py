"""The process that feeds the trackers of a run: `python -m deepclust.launch.trackers.follow RUN`.

It reads the new lines of metrics.jsonl, and looks for new rounds, until its stdin is closed. For
each tracker it notes in `tracking.json` how far it has come and what the tracker calls the run. A
tracker that fails is left out from then on, and a line on stdout says so.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepclust.errors import redact, shown
from deepclust.files import open_regular, read_record, record_of, write_json
from deepclust.launch.trackers import TRACKERS, Tracked, Tracker
from deepclust.launch.trackers.pictures import of_clusters
from deepclust.recipe.plain import flatten
from deepclust.run.directory import Run
from deepclust.run.events import is_metric
from deepclust.run.varying import Point, Varying

EVERY_S = 2.0
BLOCK = 2**22  # bytes of metrics that are read at a time
NOTES = {"offset": int, "closed": int, "pictured": int, "held": dict, "notes": dict}
WANTED = ("RequeueWanted", "KeyboardInterrupt", "Stage")  # ends of a run that goes on later


class Feed:
    """A tracker, and how far it has come with the run."""

    def __init__(self, run: Run, name: str, known: dict[str, Any]) -> None:
        self.run, self.offset = run, known.get("offset", 0)
        self.pictured = known.get("pictured", -1)  # the last round with a picture
        self.closed = known.get("closed", -1)  # the offset at which it was closed
        self.varying, self.notes = Varying(known.get("held")), known.get("notes", {})
        seen = dict(flatten(shown(run.recipe.model_dump(mode="json"))))
        parameters = {key: value for key, value in seen.items() if value is not None}
        tracked = Tracked(run, run.path.resolve().name, parameters, self.notes)
        self.tracker: Tracker = importlib.import_module(TRACKERS[name]).TRACKER(tracked)

    def step(self) -> None:
        """Send what has come since."""
        while block := _new_lines(self.run.path / "metrics.jsonl", self.offset):
            curves: dict[str, list[Point]] = {}
            for record in _records(block):
                kind, at = record.pop("kind"), record.pop("step")
                values = {k: v for k, v in record.items() if k not in ("time", "attempt")}
                for curve, points in self.varying.curves(kind, at, values).items():
                    curves.setdefault(curve, []).extend(points)
            self.tracker.curves(curves)
            self.offset += len(block)
        for number in self.run.rounds():
            if number > self.pictured:
                self.tracker.picture("clusters", number, of_clusters(self.run, number))
                self.pictured = number

    def close(self) -> None:
        """Send the rest, and how the run has ended."""
        self.step()
        self.tracker.close(_state(self.run))
        self.closed = self.offset

    def as_dict(self) -> dict[str, Any]:
        """Return what the next attempt begins with."""
        return {
            "offset": self.offset, "closed": self.closed, "pictured": self.pictured,
            "held": self.varying.held, "notes": self.notes,
        }  # fmt: skip


def _new_lines(file: Path, offset: int) -> bytes:
    """Return whole lines from an offset on, at most a block of them."""
    if not file.exists():
        return b""
    with open_regular(file) as lines:
        lines.seek(offset)
        block = lines.read(BLOCK)
    return block[: block.rfind(b"\n") + 1]


def _records(block: bytes) -> Iterator[dict[str, Any]]:
    records = (record_of(line) for line in block.splitlines())
    return (record for record in records if record is not None and is_metric(record))


def _state(run: Run) -> str:
    ends = [event for event in run.events() if event["event"] in ("finished", "stopped")]
    if not ends or ends[-1]["event"] == "finished":
        return "finished" if ends else "stopped"
    return "stopped" if ends[-1]["kind"] in WANTED else "failed"


def follow(run: Run) -> None:
    """Feed the trackers of the run until stdin is closed."""
    file = run.path / "tracking.json"
    known = {name: {} for name in TRACKERS} | _known(file)
    feeds: dict[str, Feed] = {}

    def note(name: str, feed: Feed) -> None:
        known[name] = feed.as_dict()
        write_json(file, known)

    for name in map(str, run.recipe.track):
        with _alone(name, feeds):
            feeds[name] = Feed(run, name, known[name])
            note(name, feeds[name])
    over = False
    while feeds:
        for name, feed in list(feeds.items()):
            with _alone(name, feeds):
                feed.close() if over else feed.step()
            note(name, feed)
        if over:
            return
        over = bool(select.select([sys.stdin], [], [], EVERY_S)[0])


def _known(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    record = read_record(file, dict.fromkeys(TRACKERS, dict))
    return {name: _checked(record[name]) for name in TRACKERS}


def _checked(known: dict[str, Any]) -> dict[str, Any]:
    kept = {k: known[k] for k, kind in NOTES.items() if isinstance(known.get(k), kind)}
    return kept if kept.keys() == NOTES.keys() else {}


@contextlib.contextmanager
def _alone(name: str, feeds: dict[str, Feed]) -> Iterator[None]:
    """Leave a tracker out that fails in the block, and say so on stdout and in the log."""
    try:
        yield
    except Exception as error:
        sys.stderr.write(redact(traceback.format_exc()))
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        _say(f"{name} shows the run no longer: {text} (see logs/tracking.out)")
        feeds.pop(name, None)


def _say(text: str) -> None:
    os.write(_OUT, (redact(text) + "\n").encode())


_OUT = 1  # the descriptor that our parent reads


def main() -> None:
    """Follow the run that is named; libraries print to stderr."""
    global _OUT
    _OUT = os.dup(1)
    os.dup2(2, 1)
    os.nice(5)
    follow(Run(Path(sys.argv[1])))
    sys.stderr.flush()
    os._exit(0)  # all is sent, and taking libraries down can take seconds


if __name__ == "__main__":
    main()
