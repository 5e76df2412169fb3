"""How long a run has taken, and how long it will go on: from its events and metrics alone.

A run alternates between training and rounds (extraction, whitening, clustering). The time of a step
is taken from the metrics. A round lasts from the last step before it to the first segment after it.
So of an overlapped k-means counts what somebody waits for. Every segment says how many steps the
run has and how many rounds are to come, the final one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FEWEST = 3  # lines of metrics, before which an estimate would be a guess


@dataclass
class Pace:
    """The pace of a run, as its records show it one by one, in the order of their times."""

    elapsed: float = 0.0  # seconds of attempts, without the time between them
    started: float | None = None
    last: float | None = None  # the time of the newest record of this attempt
    steps: int | None = None
    rounds_left: int = 0
    round: int = -1
    began: float | None = None  # of the round that may go on now
    mark: tuple[float, int] | None = None  # the time and number of the last step, while it trains
    trained: tuple[float, int] = (0.0, 0)  # seconds and steps
    lines: int = 0
    rounds: list[float] = field(default_factory=list)
    finished: bool = False

    def take(self, record: Mapping[str, Any], now: float) -> None:
        """Take an event, or a line of metrics of training (one with a `loss`)."""
        name = record.get("event")
        if name == "started":
            self.started = now if self.started is None else self.started
            self.last, self.mark, self.began = now, None, None
            return
        if self.last is not None:
            self.elapsed += max(0.0, now - self.last)
            self.last = now
        if name in ("checkpoint", "restored") and self.mark is None:
            self.began = now
        elif name == "training":
            self._train(record, now)
        elif name in ("finished", "stopped"):
            self.finished, self.last = name == "finished", None
        elif name is None and record.get("loss") is not None and self.mark is not None:
            self._step(int(record["step"]), now)

    def _train(self, record: Mapping[str, Any], now: float) -> None:
        """Take the beginning of a segment, and of a round's end with it where it has a new one."""
        if record["round"] > self.round and self.began is not None:
            self.rounds.append(now - self.began)
        self.round, self.began = record["round"], None
        self.steps, self.rounds_left = record.get("steps"), record.get("rounds_left", 0)
        self.mark = (now, int(record["step"]))

    def _step(self, step: int, now: float) -> None:
        assert self.mark is not None
        seconds, steps = self.trained
        self.trained = seconds + now - self.mark[0], steps + step - self.mark[1]
        self.mark, self.began, self.lines = (now, step), now, self.lines + 1

    def left(self, now: float) -> float | None:
        """Return the seconds that are left, or None as long as nothing can be said."""
        seconds, steps = self.trained
        if self.finished:
            return 0.0
        if self.steps is None or self.mark is None or steps <= 0 or self.lines < FEWEST:
            return None
        # the first round has the start of readers and caches in it, as no later one has
        later = self.rounds[1:] or self.rounds
        rounds = self.rounds_left * (sum(later) / len(later) if later else 0.0)
        total = (self.steps - self.mark[1]) * seconds / steps + rounds
        return max(0.0, total - max(0.0, now - self.mark[0]))

    def spent(self, now: float) -> float:
        """Return the seconds that the run has taken, the attempt that goes on included."""
        return self.elapsed + (max(0.0, now - self.last) if self.last is not None else 0.0)


def pace_of(events: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]) -> Pace:
    """Return the pace of a run, from its events and its lines of metrics of training."""
    pace = Pace()
    records = sorted([*events, *metrics], key=lambda record: float(record.get("time") or 0.0))
    for record in records:
        pace.take(record, float(record.get("time") or 0.0))
    return pace
