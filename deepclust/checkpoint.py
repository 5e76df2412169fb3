"""Checkpoints: weights, optimizers and counters of one step, in one atomic folder.

Tensors are safetensors and counters are JSON, so nothing here is ever unpickled. There is no RNG
state: torch is reseeded at every step from (seed, step, rank). A checkpoint that cannot be read
is set aside, which is said, and the one before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deepclust.errors import DataError
from deepclust.files import read_json, write_json
from deepclust.rundir import Run, is_done, prune, verify
from deepclust.tensorfile import write_tensors

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """Where a run is. A segment is the stretch between two plans: an epoch, or a round of steps.

    `offset` counts the steps done inside the segment; `round` is the one being trained on, -1
    before the first.
    """

    step: int = 0
    segment: int = 0
    offset: int = 0
    round: int = -1
    samples: int = 0

    def after_step(self, batch: int) -> State:
        """One optimizer step later."""
        return State(self.step + 1, self.segment, self.offset + 1, self.round, self.samples + batch)

    def after_segment(self) -> State:
        """At the beginning of the next segment."""
        return State(self.step, self.segment + 1, 0, self.round, self.samples)

    def in_round(self, number: int) -> State:
        """The same place, training on another round."""
        return State(self.step, self.segment, self.offset, number, self.samples)


def save(run: Run, state: State, parts: dict[str, Tensors], keep: int) -> bool:
    """Write a checkpoint unless this step has one; then drop all but the newest `keep`."""
    folder = run.path / "checkpoints" / f"{state.step:08d}"
    if is_done(folder):
        return False

    def fill(partial: Path) -> None:
        for name, tensors in parts.items():
            write_tensors(partial / f"{name}.safetensors", tensors)
        write_json(partial / "state.json", asdict(state))

    run.commit(folder, fill, {"step": state.step, "round": state.round})
    prune(run.checkpoints(), keep)
    return True


def load(folder: Path) -> tuple[State, dict[str, Tensors]]:
    """The state and the tensors of a checkpoint; `DataError` when it is damaged."""
    try:
        verify(folder)
        state = State(**read_json(folder / "state.json"))
        parts = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except (DataError, SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"checkpoint {folder} cannot be read: {error}") from error
    return state, parts


@dataclass(frozen=True)
class Found:
    """A checkpoint that could be read."""

    folder: Path
    state: State
    parts: dict[str, Tensors]


def load_latest(run: Run, say: Callable[[str], None]) -> Found | None:
    """The newest checkpoint that can be read, or None when there is none.

    Whoever holds the run renames a damaged one, so that its step can be saved again.
    """
    folders = run.checkpoints()
    for before, folder in reversed(list(enumerate(folders))):
        try:
            return Found(folder, *load(folder))
        except DataError as error:
            say(
                f"{error}; {'using the one before it' if before else 'starting from the beginning'}"
            )
            if run.token:
                folder.rename(folder.with_name(f"unreadable-{folder.name}"))
    return None
