"""The centre of a teacher's outputs: a moving average of their mean over all ranks' rows.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, eq. 4:
c <- m c + (1 - m) mean(outputs). Taking it off keeps one output from winning for all images.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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
    def note(
        self, outputs: Float[Tensor, "*rows k"], kept: Bool[Tensor, " b"] | None = None
    ) -> None:
        """Add outputs of this rank to those of the step; a step may have several parts.

        `kept` marks those that count, along the last but one dimension. None: all.
        """
        rows = outputs.detach().float().flatten(0, -2)
        number = rows.new_full((1,), float(len(rows)))
        if kept is not None:
            weights = kept.expand(outputs.shape[:-1]).flatten().to(rows)
            rows, number = rows * weights[:, None], weights.sum()[None]
        sums = torch.cat([rows.sum(0), number])
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the mean of what was noted since the last call; all ranks call.

        Where no output counted it stays where it is.
        """
        if self.sums is not None:
            sums = self.world.all_reduce(self.sums)
            mean = torch.where(sums[-1] > 0, sums[:-1] / sums[-1].clamp(min=1), self.value)
            self.value.lerp_(mean, 1 - self.momentum)
        self.sums = None
