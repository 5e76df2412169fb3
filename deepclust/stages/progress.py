"""Progress of a long stage: how much is done, of how much, and for how long it will go on."""

from __future__ import annotations

import time
from typing import Any

from deepclust.run.reporting import Report
from deepclust.world import World

EVERY_S = 1.0  # between two records, so that short passes do not fill the log


class StageProgress:
    """Reports how far a stage of a round is: at most once a second, and at its end.

    Every call is also a sign of life of its rank. Rank 0 reports for all.
    """

    def __init__(self, report: Report, world: World, stage: str, number: int) -> None:
        self.report = report
        self.world = world
        self.names = {"stage": stage, "round": number}
        self.began = time.monotonic()
        self.last = float("-inf")
        self.first_done: int | None = None

    def show(self, done: int, of: int, eta: float | None = None, **facts: Any) -> None:
        """Report `done` parts `of` all.

        `eta` (seconds) is estimated from the calls so far.
        """
        self.report.alive()
        now = time.monotonic()
        self.first_done = done - 1 if self.first_done is None else self.first_done
        if not self.world.is_first or (done < of and now - self.last < EVERY_S):
            return
        self.last = now
        if eta is None:
            eta = (now - self.began) / (done - self.first_done) * (of - done)
        self.report.progress(**self.names, done=done, of=of, eta=eta, **facts)
