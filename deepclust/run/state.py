"""Where a run is in its training: counters without torch, which a checkpoint keeps as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """The place of a run in its training.

    A segment is the stretch between two plans: an epoch, or the steps of a round. `offset` counts
    the steps done inside the segment. `round` is the one being trained on, -1 before the first.
    """

    step: int = 0
    segment: int = 0
    offset: int = 0
    round: int = -1
    samples: int = 0

    def after_step(self, batch: int) -> State:
        """Return the state one optimizer step later."""
        return State(self.step + 1, self.segment, self.offset + 1, self.round, self.samples + batch)

    def after_segment(self) -> State:
        """Return the state at the beginning of the next segment."""
        return State(self.step, self.segment + 1, 0, self.round, self.samples)

    def in_round(self, number: int) -> State:
        """Return the state at the same place of another round."""
        return State(self.step, self.segment, self.offset, number, self.samples)
