"""The centre of a teacher's outputs: a moving average of their mean over all ranks' rows.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, eq. 4:
c <- m c + (1 - m) mean(outputs). Taking it off keeps one output from winning for all images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.world import World


class Centre(nn.Module):
    """A centre [k], at first 0, which moves once a step: after the loss that it was used in."""

    value: Tensor

    def __init__(self, k: int, momentum: float, world: World) -> None:
        super().__init__()
        self.momentum, self.world = momentum, world
        self.register_buffer("value", torch.zeros(k))
        self.sums: Tensor | None = None  # [k + 1] of this step's outputs, and their number

    @torch.no_grad()
    def note(self, outputs: Float[Tensor, "*rows k"]) -> None:
        """Add outputs of this rank to those of the step; a step may have several parts."""
        rows = outputs.detach().float().flatten(0, -2)
        sums = torch.cat([rows.sum(0), rows.new_tensor([float(len(rows))])])
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the mean of what was noted since the last call; all ranks call."""
        if self.sums is not None:
            sums = self.world.all_reduce(self.sums)
            self.value.lerp_(sums[:-1] / sums[-1], 1 - self.momentum)
        self.sums = None
