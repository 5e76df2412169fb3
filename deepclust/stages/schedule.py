"""When a run clusters again, and how long each plan is: pure arithmetic on the recipe.

With `cluster.every: "n epochs"` a segment is an epoch. With "n steps" it is a round of n steps.
Small sets need that: on 1,797 images 90 steps a round learn, 11 do not. With "n rounds" there are n
in all. Round i of a run of S steps begins at step S (i / n)^2, or at step i if that is later.
That is SeLa's schedule, dense where labels change most (Asano et al. 2020, section 3.3; theirs ends
with a round at step S, of which nothing learns). A run made longer goes on with the rounds that it
had, at the new times.

Boundary b, before a segment that may change its round, is where round b's features are made.
`cluster.overlap` delays its adoption by one boundary, so that k-means has a period to run in:

    boundary              0    1    2    3
    trained on from it    0    1    2    3       without overlap
                          0    0    1    2       with overlap
    begun for the next         1    2            nothing at the last: nobody would train on it
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepclust.data.shards.find import described
from deepclust.errors import DataError
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Cadence, parse_cadence
from deepclust.run.state import State

if TYPE_CHECKING:
    from deepclust.methods.base import Now

LANES = 8  # the ranks of a node, each with its shards
MOST_BANK, MOST_QUERIES = 25_000, 5_000  # images of an evaluation: they bound time and memory
QUERIES = 0.2  # share of the labelled images, where no others are given


@dataclass(frozen=True)
class Timeline:
    """The segments of a run over `n` samples."""

    every: Cadence
    epochs: int
    until: int | None
    overlap: bool
    epoch_steps: int
    lanes: int  # of a plan for block reading; the same for any number of ranks
    batch: int
    checkpoint: Cadence
    clusters: bool = True  # False: an online method, whose segments are epochs without rounds
    average_from: float | None = None
    evaluate: Cadence | None = None
    final: bool = False  # whether a round is made after the last step

    @classmethod
    def of(cls, recipe: Recipe, n: int) -> Timeline:
        """Return the timeline of a recipe, or raise `DataError` for fewer images than a batch."""
        steps = n // recipe.train.batch
        if steps == 0:
            raise DataError(
                f"{described(recipe.data.shards)} has {n} images, fewer than one batch of "
                f"{recipe.train.batch}: lower train.batch"
            )
        config, train = recipe.cluster, recipe.train
        every = parse_cadence(config.every) if config else Cadence(1, "epoch")
        if every.unit == "round" and every.count > train.epochs * steps:
            raise DataError(
                f"cluster.every: {every.count} rounds do not fit into {train.epochs * steps} steps "
                f"({train.epochs} epochs of {n} images): set fewer rounds, or more train.epochs"
            )
        return cls(
            every=every,
            epochs=train.epochs,
            until=config.until if config else None,
            overlap=config is not None and config.overlap,
            epoch_steps=steps,
            lanes=math.gcd(train.batch, LANES),
            batch=train.batch,
            checkpoint=parse_cadence(train.checkpoint),
            clusters=config is not None,
            average_from=train.average_from,
            evaluate=None if train.evaluate is None else parse_cadence(train.evaluate),
            final=config is not None and config.final,
        )

    def now(self, state: State) -> Now:
        """Return the time of a state, counted in samples."""
        from deepclust.methods.base import Now  # torch, which nothing else here needs

        epochs = state.samples / (self.epoch_steps * self.batch)
        return Now(state.step, epochs, min(1.0, epochs / self.epochs))

    def averaged(self, steps: int) -> int:
        """Return of how many weights the average is after so many steps."""
        if self.average_from is None:
            return 0
        first = math.ceil(self.average_from * self.epoch_steps - 1e-6)  # the last is not averaged
        return max(0, steps - first)

    def save_due(self, state: State) -> bool:
        """Return whether a state is one to save, by `train.checkpoint`."""
        return self._is_due(self.checkpoint, state)

    def evaluate_due(self, state: State) -> bool:
        """Return whether a state is one to evaluate, by `train.evaluate`; the last one is too."""
        if self.evaluate is None or state.step == 0:
            return False
        return self.finished(state) or self._is_due(self.evaluate, state)

    def _is_due(self, every: Cadence, state: State) -> bool:
        if every.unit == self.every.unit == "epoch":  # segments are epochs
            return state.offset == 0 and state.segment % every.count == 0
        steps = every.count * (self.epoch_steps if every.unit == "epoch" else 1)
        return state.step % steps == 0

    def finished(self, state: State) -> bool:
        """Return whether the state is at the end.

        The last round of steps may be a short one.
        """
        if self.every.unit == "epoch":
            return state.segment >= self.epochs
        return state.offset == 0 and state.step >= self.all_steps

    def steps(self, state: State) -> int | None:
        """Return the length of the state's segment.

        None is one pass over all valid samples.
        """
        if self.every.unit == "epoch":
            return None
        if self.every.unit == "step":
            return min(self.every.count, self._steps_left(state))
        if state.segment >= self.every.count - 1:
            return self._steps_left(state)
        until_next = self._start(state.segment + 1) - (state.step - state.offset)
        return min(max(1, until_next), self._steps_left(state))

    def round_of(self, state: State) -> int:
        """Return the round that the state's segment trains on, or -1 where nothing is clustered."""
        if not self.clusters:
            return -1
        return max(0, self._boundary(state) - 1) if self.overlap else self._boundary(state)

    def rounds_after(self, state: State) -> int:
        """Return how many rounds are to come after the state's, the final one too."""
        if not self.clusters:
            return 0
        last = self.epochs - 1
        if self.every.unit == "step":
            last = (self.all_steps - 1) // self.every.count
        elif self.every.unit == "round":
            last = self.every.count - 1
        number = self.round_of(State(segment=max(last, state.segment)))
        return max(0, number - max(0, state.round)) + self.final

    def precedes(self, state: State, number: int) -> bool:
        """Return whether a state is from before the features of a round were made."""
        return (state.segment, state.offset) <= (number * self._period, 0)

    def refresh_due(self, state: State) -> bool:
        """Return whether the segment begins with a new round."""
        return state.offset == 0 and self.round_of(state) > state.round

    def round_ahead(self, state: State) -> int | None:
        """Return the round to begin at the state's boundary for the next one, with overlap."""
        number = self._boundary(state)
        at_boundary = state.offset == 0 and state.segment == number * self._period
        if not (self.overlap and at_boundary and number > 0 and self._goes_on(state)):
            return None
        return number

    @property
    def _period(self) -> int:
        """Segments from boundary to boundary."""
        return self.every.count if self.every.unit == "epoch" else 1

    def _boundary(self, state: State) -> int:
        """Return the newest boundary at or before the state, counted from 0."""
        return min(state.segment, self._last_refresh()) // self._period

    def _goes_on(self, state: State) -> bool:
        """Return whether another boundary follows the one where the state is."""
        if state.segment + self._period > self._last_refresh():
            return False
        if self.every.unit == "epoch":
            return state.segment + self._period < self.epochs
        if self.every.unit == "round":
            return True  # the last one begins before the end
        return self._steps_left(state) > self.every.count

    def _steps_left(self, state: State) -> int:
        """Return the steps of the run from the beginning of the state's segment on."""
        return self.all_steps - (state.step - state.offset)

    @property
    def all_steps(self) -> int:
        """The steps of the run."""
        return self.epochs * self.epoch_steps

    def _start(self, number: int) -> int:
        """Return the step at which a round begins, where rounds are counted."""
        return max(number, self.all_steps * number**2 // self.every.count**2)

    def _last_refresh(self) -> int:
        """Return the last segment that may begin with a new round."""
        if self.every.unit == "round":
            numbers, end = range(self.every.count), (self.until or self.epochs) * self.epoch_steps
            return max(number for number in numbers if self._start(number) < end)
        if self.until is None:
            return sys.maxsize
        if self.every.unit == "epoch":
            return self.until - 1
        return max(0, (self.until * self.epoch_steps - 1) // self.every.count)
