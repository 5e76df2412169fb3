"""Checkpoints: weights, optimizers and counters of one step, in one atomic folder.

Tensors are safetensors and counters are JSON, so nothing here is ever unpickled. There is no RNG
state: torch is reseeded at every step from (seed, step, rank). A checkpoint that cannot be read is
renamed with a warning, and the one before it is used.

Of some parameters every rank owns a slice (`world.Owned`). Each rank saves its slices into a file,
`owned-RRRRR.safetensors`, and rank 0 moves all of them into the folder before it appears. They are
read by ranges, so another number of ranks can go on. Without slices only rank 0 saves.
`checkpoint_writer` writes, this file reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from deepclust.errors import DataError, DeepclustError
from deepclust.files import read_record, reading, set_aside
from deepclust.run.directory import Run, is_done, numbered, verify
from deepclust.run.signs import unwatched
from deepclust.run.state import State as State
from deepclust.world import Owned

Tensors = dict[str, Tensor]
OwnedTensors = dict[str, tuple[Tensor, Owned]]
_REMEDY = (
    "Copy the missing file back, or delete the folder: `resume` then uses the checkpoint before it."
)


def load(
    folder: Path, check: bool = True, alive: Callable[[], None] = unwatched
) -> tuple[State, dict[str, Tensors]]:
    """Return the state and the tensors that rank 0 saved.

    Without `check` no file is compared with its hash, because another rank has done it. Raises
    `DataError` when the checkpoint is damaged.
    """
    try:
        if check:
            verify(folder, alive)
        state = read_state(folder)
        with reading(folder):
            files = [
                f for f in sorted(folder.glob("*.safetensors")) if not f.name.startswith("owned-")
            ]
            parts = {file.stem: load_file(file) for file in files}
    except DataError as error:
        raise DataError(f"checkpoint {folder} cannot be read: {error}") from error
    return state, parts


def put_weights(
    module: nn.Module, weights: Tensors, what: object, absent: Container[str] = ()
) -> None:
    """Load the weights of `what` into a network, of which those named in `absent` are elsewhere.

    Raises `DataError` when they are of another network.
    """
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        sizes = str(error).splitlines()[-1].strip()
        raise DataError(
            f"{what} is not of the network that recipe.yaml describes: {sizes}"
        ) from None
    missing = [name for name in missing if name not in absent]
    if missing or unexpected:
        raise DataError(
            f"{what} is not of the network that recipe.yaml describes: it lacks {missing[:3]} and "
            f"has {unexpected[:3]} beside it. Put recipe.yaml back, or use the version of "
            "deepclust that wrote the run (env.json)."
        )


def read_state(folder: Path) -> State:
    """Return the state that a checkpoint was saved in, or raise `DataError`."""
    names = [field.name for field in fields(State)]
    record = read_record(folder / "state.json", dict.fromkeys(names[:-1], int))
    with reading(folder / "state.json"):
        return State(**record)


def load_owned(folder: Path, owned: dict[str, Owned]) -> Tensors:
    """Return this rank's rows of each name, on the CPU, from any division of the rows over files.

    Only these ranges are read. `load` has checked the hashes. Raises `DataError` when the files
    lack a range, or hold a parameter of another size.
    """
    with _opened(folder) as files:
        return {name: _gather(folder, files, name, own) for name, own in owned.items()}


def owned_names(folder: Path) -> set[str]:
    """Return the names of which the owners' files hold rows."""
    with _opened(folder) as files:
        return {name for file in files for name in file.ranges}


@contextmanager
def _opened(folder: Path) -> Iterator[list[_OwnedFile]]:
    """Open the owners' files.

    One that cannot be read is a `DataError`.
    """
    with ExitStack() as stack:
        try:
            yield [
                _OwnedFile(file, stack.enter_context(safe_open(file, "pt")))
                for file in sorted(folder.glob("owned-*.safetensors"))
            ]
        except DeepclustError:
            raise
        except Exception as error:  # libraries raise what they like for a damaged file
            raise DataError(f"checkpoint {folder} cannot be read: {error}") from error


class _OwnedFile:
    """An open file of an owner, and the range that it holds of each name."""

    def __init__(self, path: Path, opened: Any) -> None:
        self.path, self.opened = path, opened
        ranges = json.loads(opened.metadata()["owned"])
        self.ranges = {name: Owned(**own) for name, own in ranges.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the whole parameter."""
        held = self.ranges[name]
        span = slice(start - held.start, stop - held.start)
        rows: Tensor = self.opened.get_slice(name)[(*[slice(None)] * held.dim, span)]
        return rows


def _gather(folder: Path, files: list[_OwnedFile], name: str, own: Owned) -> Tensor:
    """Return this rank's rows of one parameter, from all the files that hold some of them."""
    holders = [file for file in files if name in file.ranges]
    _check_size(folder, holders, name, own)
    pieces, at = [], own.start
    for file in sorted(holders, key=lambda file: file.ranges[name].start):
        stop = min(file.ranges[name].stop, own.stop)
        if file.ranges[name].start <= at < stop:
            pieces.append(file.read(name, at, stop))
            at = stop
    if at < own.stop:
        raise DataError(
            f"checkpoint {folder} lacks rows {at} to {own.stop - 1} of {name}: no "
            f"owned-*.safetensors there holds row {at}. {_REMEDY}"
        )
    if not pieces:  # an empty range, in the shape of the others
        start = holders[0].ranges[name].start
        return holders[0].read(name, start, start)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, own.dim)


def _check_size(folder: Path, holders: list[_OwnedFile], name: str, own: Owned) -> None:
    if not holders:
        raise DataError(
            f"checkpoint {folder} lacks {name}: no owned-*.safetensors there holds it. {_REMEDY}"
        )
    for file in holders:
        held = file.ranges[name]
        if (held.dim, held.total) != (own.dim, own.total):
            raise DataError(
                f"{file.path} holds {name} of {held.total} rows (dimension {held.dim}), not of "
                f"{own.total} (dimension {own.dim}): resume with the recipe it was saved under"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that could be read, with the tensors that rank 0 saved, by file and name."""

    folder: Path
    state: State
    parts: dict[str, Tensors]


def average_dir(run: Run, step: int) -> Path:
    """Return the folder of the average of weights that a run ended with (`train.average_from`)."""
    return run.path / "averages" / f"{step:08d}"


def load_average(folder: Path, alive: Callable[[], None] = unwatched) -> Tensors:
    """Return the weights of an average, or raise `DataError` when it is damaged."""
    verify(folder, alive)
    with reading(folder):
        return load_file(folder / "model.safetensors")


def counting_weights(run: Run, saved: Checkpoint) -> Tensors:
    """Return the weights of a checkpoint that are evaluated and exported.

    They are the average of a run that ended there and wants one, else those that were trained. A
    best checkpoint was scored as it was trained.
    """
    folder = average_dir(run, saved.state.step)
    is_best = saved.folder.parent.name == "best"
    if run.recipe.train.average_from is None or is_best or not is_done(folder):
        return saved.parts["model"]
    return load_average(folder, run.alive)


def load_latest(run: Run, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that can be read, or None when there is none.

    A process that holds the run renames a damaged one, so that its step can be saved again.
    """
    folders = numbered(run.path / "checkpoints")
    for before, folder in reversed(list(enumerate(folders))):
        try:
            if not is_done(folder):
                raise DataError(f"checkpoint {folder} is not whole: it has no DONE")
            return Checkpoint(folder, *load(folder, alive=run.alive))
        except DataError as error:
            warn(f"{error}; {'using the previous one' if before else 'starting from step 0'}")
            if run.token:
                set_aside(folder, "unreadable")
    return None
