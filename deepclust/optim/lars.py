"""LARS: SGD whose step in every weight matrix is in proportion to that matrix's own size.

You et al., "Large Batch Training of Convolutional Networks", 2017, algorithm 1; biases and norms
(one dimension) take plain SGD without weight decay, as in SimCLR and BYOL. The trust ratio scales
the gradient before the momentum, as most PyTorch versions do; the reference scales the rate, which
is the same while the rate is constant.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD

TRUST = 0.001  # eta of the paper


class LARS(SGD):
    """g <- TRUST |w| / |g + decay w| (g + decay w), then SGD with momentum."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Scale the gradients in place, then make SGD's step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.ndim > 1:
                    weight.grad.add_(weight, alpha=self.decay)
                    weight.grad.mul_(trust(weight, weight.grad))
        super().step()


def trust(weight: Float[Tensor, "*s"], grad: Float[Tensor, "*s"]) -> Float[Tensor, ""]:
    """TRUST |w| / |g|; 1 where either is zero. Stays on the device."""
    w, g = weight.norm(), grad.norm()
    return torch.where((w > 0) & (g > 0), TRUST * w / g.clamp_min(1e-38), torch.ones_like(w))
