"""LARS: SGD whose step in every weight matrix is in proportion to that matrix's own size.

You et al., "Large Batch Training of Convolutional Networks", 2017, algorithm 1. Parameters of one
dimension (biases, norms) take plain SGD, as in SimCLR and BYOL. The trust ratio scales the gradient
before the momentum, as in most PyTorch versions. The reference scales the rate, which is the same
while the rate is constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD

TRUST = 0.001  # eta of the paper
DECAY = "decay"  # a group's weight decay, under a key that SGD does not add itself


class LARS(SGD):
    """SGD with momentum on g <- TRUST |w| / |g + decay w| (g + decay w).

    Each group has its own `decay`, which is 0 if it does not say so.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | list[dict[str, Any]], lr: float, momentum: float
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group.setdefault(DECAY, 0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Scale the gradients in place, then make SGD's step."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group[DECAY] and weights:
                grads = [weight.grad for weight in weights]
                torch._foreach_add_(grads, weights, alpha=group[DECAY])
            matrices = [weight for weight in weights if weight.ndim > 1]
            if matrices:
                grads = [weight.grad for weight in matrices]
                torch._foreach_mul_(grads, list(trust(matrices, grads).unbind()))
        super().step()


def trust(weights: list[Tensor], grads: list[Tensor]) -> Float[Tensor, " p"]:
    """Return TRUST |w| / |g| of each, 1 where either is zero, without leaving the device."""
    w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, grads))
    return torch.where((w > 0) & (g > 0), TRUST * w / g.clamp_min(1e-38), torch.ones_like(w))
