"""Norms of gradients, and clipping by them, where ranks may own slices of some parameters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.data.to_device import constant
from deepclust.world import World

_TINY = 1e-6  # added to a norm before it divides, as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def norms_of(
    parameters: dict[str, nn.Parameter], owned: Collection[str], world: World
) -> Float[Tensor, " p"]:
    """Return the L2 norm of every parameter's gradient (0 without one), on its device.

    DDP has averaged the gradients, so each rank has the norm already. Of an `owned` parameter each
    rank has a slice, so the squares are added over the ranks. All ranks call with the same names.
    """
    gradients = [p.new_zeros(1) if p.grad is None else p.grad for p in parameters.values()]
    norms = torch.stack(torch._foreach_norm(gradients)).float()
    if world.size == 1 or not owned:
        return norms
    sliced = constant([float(name in owned) for name in parameters], norms.device) > 0
    squares = world.all_reduce(norms.double().square() * sliced)
    return torch.where(sliced, squares.sqrt().float(), norms)


@torch.no_grad()
def clip(
    parameters: dict[str, nn.Parameter],
    norms: Float[Tensor, " p"],
    most: float,
    by: Literal["norm", "tensor"],
) -> None:
    """Scale gradients in place to a total norm, or each to a norm, of at most `most`."""
    reference = norms.norm().expand_as(norms) if by == "norm" else norms
    factors = (most / (reference + _TINY)).clamp(max=1.0)
    for parameter, factor in zip(parameters.values(), factors, strict=True):
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
