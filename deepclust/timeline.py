"""When a run clusters again, and how long each plan is: pure arithmetic on the recipe.

With `cluster.every: "n epochs"` a segment is an epoch; with "n steps" it is a round of n steps
(small sets need it: on 1,797 images 90 steps a round learn, 11 do not).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from deepclust.checkpoint import State
from deepclust.errors import DataError
from deepclust.recipe import Cadence, Recipe, parse_cadence

LANES = 8  # a node's worth of ranks, each with shards of its own


@dataclass(frozen=True)
class Timeline:
    """The segments of a run over `n` samples."""

    every: Cadence
    epochs: int
    until: int | None
    epoch_steps: int
    lanes: int  # of a plan for block reading; the same for any number of ranks

    @classmethod
    def of(cls, recipe: Recipe, n: int) -> Timeline:
        """The timeline of a recipe; `DataError` when there are fewer images than a batch."""
        steps = n // recipe.train.batch
        if steps == 0:
            raise DataError(
                f"{recipe.data.shards} has {n} images, fewer than one batch of "
                f"{recipe.train.batch}: lower train.batch"
            )
        every = parse_cadence(recipe.cluster.every)
        lanes = math.gcd(recipe.train.batch, LANES)
        return cls(every, recipe.train.epochs, recipe.cluster.until, steps, lanes)

    def finished(self, state: State) -> bool:
        """Whether the state stands at the end; the last round of steps may be a short one."""
        if self.every.unit == "epoch":
            return state.segment >= self.epochs
        return state.offset == 0 and state.step >= self.epochs * self.epoch_steps

    def steps(self, state: State) -> int | None:
        """Length of the state's segment; None = one pass over all valid samples."""
        if self.every.unit == "epoch":
            return None
        left = self.epochs * self.epoch_steps - (state.step - state.offset)
        return min(self.every.count, left)

    def round_of(self, state: State) -> int:
        """The round that the state's segment trains on."""
        per_round = self.every.count if self.every.unit == "epoch" else 1
        return min(state.segment, self._last_refresh()) // per_round

    def refresh_due(self, state: State) -> bool:
        """Whether the segment begins with a new round."""
        return state.offset == 0 and self.round_of(state) > state.round

    def _last_refresh(self) -> int:
        """The last segment that may begin with a new round."""
        if self.until is None:
            return sys.maxsize
        if self.every.unit == "epoch":
            return self.until - 1
        return max(0, (self.until * self.epoch_steps - 1) // self.every.count)
