"""What of method and optimizers goes into a checkpoint, and how it comes back.

Rank 0 writes for all, except for the parameters of which every rank owns a slice (`Method.owned`):
those, and their momentum, each rank writes and reads for itself, under the names "model/PARAMETER"
and "OPTIMIZER/PARAMETER".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from deepclust.errors import NumericalError
from deepclust.methods.base import Method
from deepclust.optim.optimizers import Optimizers
from deepclust.run import checkpoint
from deepclust.run.checkpoint import OwnedTensors, State, Tensors
from deepclust.run.directory import Run
from deepclust.run.reporting import Report
from deepclust.world import World


def saver(
    run: Run, keep: int, world: World, report: Report, method: Method, optimizers: Optimizers
) -> Callable[[State], None]:
    """A function that saves where we are; all ranks call it, and rank 0 or all do something."""

    def save(state: State) -> None:
        if not (world.is_first or method.owned()):
            return
        parts, slices = split(method, optimizers)
        error = _not_finite({**parts["model"], **{n: t for n, (t, _) in slices.items()}}, state)
        if slices:
            world.raise_all(error, f"step {state.step}")
        elif error is not None:
            raise error
        if checkpoint.save(run, state, parts, keep, slices, world) and world.is_first:
            report.event("checkpoint", step=state.step)

    return save


def split(method: Method, optimizers: Optimizers) -> tuple[dict[str, Tensors], OwnedTensors]:
    """What rank 0 saves, by file, and this rank's slices."""
    held, state = method.owned(), dict(method.state_dict())
    slices = {f"model/{name}": (state.pop(name), own) for name, own in held.items()}
    parts: dict[str, Tensors] = {"model": state, **{name: {} for name in optimizers.by_name}}
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for group, number, parameter, buffer in optimizers.buffers():
        name = names[id(parameter)]
        if name in held:
            slices[f"{group}/{name}"] = buffer, held[name]
        else:
            parts[group][str(number)] = buffer
    return parts, slices


def put_back(
    folder: Path, parts: dict[str, Tensors], method: Method, optimizers: Optimizers
) -> None:
    """Undo `split`, from a checkpoint's folder and what rank 0 had saved there."""
    parameters = dict(method.named_parameters())
    for key, tensor in _owned(folder, method, optimizers).items():
        part, _, name = key.partition("/")
        number = name if part == "model" else optimizers.number(part, parameters[name])
        parts.setdefault(part, {})[number] = tensor
    method.load_state_dict(parts.pop("model"))
    optimizers.load_state(parts)


def _owned(folder: Path, method: Method, optimizers: Optimizers) -> Tensors:
    """This rank's slices, and what momentum there is of them."""
    held = method.owned()
    there = checkpoint.owned_names(folder) if held else set()
    return checkpoint.load_owned(
        folder,
        {
            f"{part}/{name}": own
            for part in ("model", *optimizers.by_name)
            for name, own in held.items()
            if part == "model" or f"{part}/{name}" in there  # an optimizer may be new
        },
    )


def _not_finite(tensors: Tensors, state: State) -> NumericalError | None:
    """An error instead of weights that no resume could go on from."""
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if not broken:
        return None
    return NumericalError(
        f"at step {state.step} the weights are not finite ({broken[0]}); nothing was saved and "
        "the checkpoint before is sound. Lower train.lr in a new run that starts from it "
        "(init.weights)."
    )
