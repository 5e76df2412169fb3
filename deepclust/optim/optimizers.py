"""Optimizers of a method: one for each role, with all state saved by parameter name.

The body follows the schedules. What a round renews is the head. Its rate is constant, and a renewed
row has no state: the momentum of an old classifier would push the new one anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deepclust.errors import DataError, RecipeError
from deepclust.optim import gradients
from deepclust.optim.lars import DECAY, LARS
from deepclust.optim.schedule import learning_rate, weight_decay
from deepclust.recipe.sections import TrainSection
from deepclust.world import ALONE, World

Tensors = dict[str, Tensor]
Kind = Literal["sgd", "lars", "adamw"]
MOMENTUM = "momentum_buffer"
_STATE: dict[Kind, set[str]] = {
    "sgd": {MOMENTUM},
    "lars": {MOMENTUM},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}


class Now(Protocol):
    """The time of a step, as schedules read it."""

    @property
    def epochs(self) -> float:
        """Epochs done, counted in samples."""


@dataclass(frozen=True)
class Group:
    """Parameters of one role, by the method's parameter name.

    The order counts: old checkpoints number the parameters of a group by it.
    """

    role: Literal["body", "head"]
    parameters: dict[str, nn.Parameter]


class Optimizers:
    """One optimizer for each role that has parameters.

    The body takes `config.optimizer`. Heads take SGD, or AdamW if the body does. Of parameters
    named in `owned` every rank holds a slice.
    """

    def __init__(
        self,
        groups: list[Group],
        config: TrainSection,
        owned: Collection[str] = (),
        world: World = ALONE,
    ) -> None:
        self.config, self.owned, self.world = config, frozenset(owned), world
        self.groups: dict[str, dict[str, nn.Parameter]] = {
            group.role: group.parameters for group in groups if group.parameters
        }
        self.by_role = {role: self._make(role) for role in self.groups}

    def set_schedule(self, now: Now) -> float:
        """Set the body's rate and the weight decay of all, and return the rate.

        The head keeps its own rate. It starts again every round, and a head that learns no more
        teaches the body nothing. On Fashion-MNIST a cosine on both made 20-NN 0.5 % worse.
        """
        rate = learning_rate(self.config, now.epochs)
        decay = weight_decay(self.config, now.epochs)
        for role, optimizer in self.by_role.items():
            for group in optimizer.param_groups:
                if role == "body":
                    group["lr"] = rate
                if group["decays"]:
                    group[self._decay_key(role)] = decay
        return rate

    def step(self) -> Float[Tensor, ""]:
        """Clip, update and drop the gradients, and return their norm before clipping.

        The norm is that of the whole model's gradient on every rank, also where ranks own slices.
        All ranks must call.
        """
        every = {n: p for parameters in self.groups.values() for n, p in parameters.items()}
        norms = gradients.norms_of(every, self.owned, self.world)
        if self.config.clip is not None:
            gradients.clip(every, norms, self.config.clip, self.config.clip_by)
        for optimizer in self.by_role.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total: Tensor = norms.norm()
        return total

    def renew(self, rows: dict[str, Bool[Tensor, " k"]]) -> None:
        """Forget the state of renewed rows (dimension 0), by parameter name.

        If all rows are new, the parameter starts as with a new optimizer. If only some are, Adam's
        step count stays, because it counts for the whole parameter. The first updates of those rows
        are then not corrected for their zero moments.
        """
        for role, parameters in self.groups.items():
            for name in parameters.keys() & rows.keys():
                _forget(self.by_role[role].state, parameters[name], rows[name])

    def state(self) -> Iterator[tuple[str, str, nn.Parameter, str, Tensor]]:
        """Yield every state tensor: role, parameter name, parameter, state key, tensor."""
        for role, optimizer in self.by_role.items():
            for name, parameter in self.groups[role].items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield role, name, parameter, key, value

    def load_state(self, parts: dict[str, Tensors]) -> None:
        """Put state back: by role, then by "PARAMETER/KEY".

        Old checkpoints have the parameter's number in its group instead, with its momentum. Raises
        `DataError` for state of another optimizer, or of a parameter that the method has not.
        """
        for role, optimizer in self.by_role.items():
            for entry, value in parts.get(role, {}).items():
                name, key = self._entry(role, entry)
                parameter = self.groups[role][name]
                fused = bool(optimizer.defaults.get("fused"))
                optimizer.state[parameter][key] = _like(parameter, value, fused)

    def _make(self, role: str) -> Optimizer:
        config, groups = self.config, self._param_groups(role)
        if self._kind(role) == "lars":
            if sliced := sorted(self.owned & self.groups[role].keys()):
                raise RecipeError(
                    f"train.optimizer=lars measures whole parameters, and ranks own slices of "
                    f"{sliced[0]}: choose sgd or adamw"
                )
            return LARS(groups, lr=config.lr, momentum=config.momentum)
        rate = config.head_lr or config.lr if role == "head" else config.lr
        if self._kind(role) == "adamw":
            return AdamW(
                groups, lr=rate, betas=config.betas, weight_decay=0.0, fused=self._fused(role)
            )
        momentum = config.head_momentum if role == "head" else config.momentum
        nesterov = config.nesterov and momentum > 0
        return SGD(
            groups, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=0.0,
            fused=self._fused(role),
        )  # fmt: skip

    def _fused(self, role: str) -> bool | None:
        """Return whether one kernel makes the step, as on a GPU; None leaves it to torch."""
        return True if all(p.is_cuda for p in self.groups[role].values()) else None

    def _param_groups(self, role: str) -> list[dict[str, Any]]:
        """Split a role's parameters into those with weight decay and those without."""
        every = self.config.decay
        every = ("all" if self._kind(role) == "sgd" else "matrices") if every == "auto" else every
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.groups[role].items():
            split[every == "all" or is_matrix(name, parameter)].append(parameter)
        key, decay = self._decay_key(role), self.config.weight_decay
        return [
            {"params": parameters, "decays": decays, key: decay if decays else 0.0}
            for decays, parameters in split.items()
            if parameters
        ]

    def _kind(self, role: str) -> Kind:
        kind = self.config.optimizer
        return "sgd" if role == "head" and kind == "lars" else kind

    def _decay_key(self, role: str) -> str:
        return DECAY if self._kind(role) == "lars" else "weight_decay"

    def _entry(self, role: str, entry: str) -> tuple[str, str]:
        """Return the parameter name and state key of an entry of a checkpoint."""
        names = list(self.groups[role])
        name, _, key = entry.rpartition("/")
        if entry.isdigit() and int(entry) < len(names):
            name, key = names[int(entry)], MOMENTUM
        if name not in names or key not in _STATE[self._kind(role)]:
            raise DataError(
                f"the checkpoint has {entry} of the {role}'s optimizer, which "
                f"train.optimizer={self.config.optimizer} does not know: resume with the recipe "
                "that it was saved under"
            )
        return name, key


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether this is a weight with more than one dimension: neither a bias nor a norm."""
    return parameter.ndim > 1 and not name.endswith("bias")


def _forget(state: dict[Tensor, Any], parameter: nn.Parameter, rows: Bool[Tensor, " k"]) -> None:
    if bool(rows.all()):
        state.pop(parameter, None)
        return
    for value in state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.ndim:
            value[rows.to(value.device)] = 0


def _like(parameter: nn.Parameter, value: Tensor, fused: bool) -> Tensor:
    """Return state in the parameter's own layout, which decides how the update is computed."""
    if value.ndim == 0:  # a count of steps: a fused step wants it on the device, others do not
        return value.to(parameter.device) if fused else value.clone()
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
