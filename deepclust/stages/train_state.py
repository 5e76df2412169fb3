"""What of method and optimizers goes into a checkpoint, and how it comes back.

Rank 0 writes for all, except for the parameters of which every rank owns a slice (`Method.owned`).
Those, and their optimizer state, each rank writes and reads itself, under the names
"model/PARAMETER" and "ROLE/PARAMETER/KEY" (in old checkpoints "ROLE/PARAMETER", the momentum).
"""

from __future__ import annotations

from pathlib import Path

import torch

from deepclust.errors import NumericalError
from deepclust.methods.base import Method
from deepclust.optim.optimizers import MOMENTUM, Optimizers
from deepclust.run import checkpoint
from deepclust.run.checkpoint import OwnedTensors, State, Tensors
from deepclust.run.checkpoint_writer import CheckpointWriter


def begin_save(
    state: State, writer: CheckpointWriter, method: Method, optimizers: Optimizers
) -> None:
    """Begin a checkpoint unless the step has one.

    All ranks call it.
    """
    owned = method.owned()
    if not (writer.world.is_first or owned):
        return
    parts, slices = split(method, optimizers)
    writer.put(state, parts, slices)


def split(method: Method, optimizers: Optimizers) -> tuple[dict[str, Tensors], OwnedTensors]:
    """Return what rank 0 saves, by file, and this rank's slices."""
    held, weights = method.owned(), dict(method.state_dict())
    slices = {f"model/{name}": (weights.pop(name), own) for name, own in held.items()}
    parts: dict[str, Tensors] = {"model": weights, **{role: {} for role in optimizers.by_role}}
    for role, name, _, key, value in optimizers.state():
        if name in held and value.ndim:  # a count of steps is the same on all ranks
            slices[f"{role}/{name}/{key}"] = value, held[name]
        else:
            parts[role][f"{name}/{key}"] = value
    return parts, slices


def put_back(
    folder: Path, parts: dict[str, Tensors], method: Method, optimizers: Optimizers
) -> None:
    """Undo `split`, from a checkpoint's folder and what rank 0 had saved there."""
    held = method.owned()
    wanted = {f"model/{name}": (("model", name), own) for name, own in held.items()}
    for stored in checkpoint.owned_names(folder) if held else ():
        role, _, entry = stored.partition("/")
        name, _, key = entry.partition("/")
        if role in optimizers.by_role and name in held:
            wanted[stored] = (role, f"{name}/{key or MOMENTUM}"), held[name]
    slices = checkpoint.load_owned(folder, {stored: own for stored, (_, own) in wanted.items()})
    for stored, ((part, entry), _) in wanted.items():
        parts.setdefault(part, {})[entry] = slices[stored]
    checkpoint.put_weights(method, parts.pop("model", {}), f"checkpoint {folder}")
    optimizers.load_state(parts)


def check_finite_weights(state: State, tensors: Tensors) -> None:
    """Raise NumericalError in place of weights that no resume could go on from."""
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise NumericalError(
            f"at step {state.step} the weights are not finite ({broken[0]}); nothing was saved "
            "and the checkpoint before is sound. Lower train.lr in a new run that starts from it "
            "(init.weights)."
        )
