"""Seconds of what one process does with n samples: a n + b n log2 n + c.

A short run has too few samples to show what a plan and statistics of a hundred million take.
`tools/bench/hundred_million.py` has walked through these stages and fitted the numbers. They are of
two cores of a server, and another machine may need half or twice as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """The cost of a stage in seconds: a of a sample, b of a sample that is sorted, and c."""

    a: float
    b: float
    c: float

    def seconds(self, n: int) -> float:
        """Return the seconds that the stage takes with n samples."""
        return n * (self.a + self.b * math.log2(max(n, 1))) + self.c


STAGES = {
    "plan": Growth(0.0, 1.27e-8, 0.0),  # of a segment, by every rank
    "statistics": Growth(1.53e-6, 1.79e-9, 1.29),  # of a round beside the one before and the labels
}


def growth(stage: str, n: int, shown: int = 0) -> float:
    """Return the seconds of a stage with n samples beyond those that `shown` samples took."""
    cost = STAGES[stage]
    return cost.seconds(n) - (cost.seconds(shown) if shown else 0.0)
