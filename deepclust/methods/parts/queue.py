"""A queue of past rows: negatives of MoCo, or more samples for an assignment (SwAV).

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, section
3.2 and algorithm 1. Every rank holds the whole queue, as a persistent buffer: a resumed run has the
rows that it had. The reference keeps its write position in a buffer. Here position and filling are
functions of the number of pushes before, so nothing is counted and nothing is read from the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.world import World, derive


class Queue(nn.Module):
    """The last `size` rows [size, d] of all ranks, in float32; the oldest is overwritten first.

    With a seed it starts as random unit rows, as MoCo's does, without one as zeros (`filled` says
    how many rows mean something). It takes 4 size d bytes on every rank.
    """

    rows: Tensor

    def __init__(self, size: int, dim: int, world: World, seed: int | None = None) -> None:
        super().__init__()
        self.world = world
        self.register_buffer("rows", torch.zeros(size, dim))
        if seed is not None:
            random = torch.Generator().manual_seed(derive(seed, "queue"))
            self.rows.copy_(F.normalize(torch.randn(size, dim, generator=random)))

    def filled(self, pushes: int, batch: int) -> int:
        """Return how many rows, the first ones, were pushed by `pushes` global batches."""
        return min(len(self.rows), pushes * batch)

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "b d"], pushes: int) -> None:
        """Write the ranks' rows, in the order of ranks, over the oldest ones.

        `pushes` is the number of pushes before this one, each of as many rows. All ranks call. Of
        more rows than the queue holds, the last ones stay.
        """
        size = len(self.rows)
        gathered = self.world.all_gather_rows(rows.detach().to(self.rows.dtype))
        kept = gathered[-size:]
        first = (pushes + 1) * len(gathered) - len(kept)
        places = (torch.arange(len(kept), device=kept.device) + first % size) % size
        self.rows.index_copy_(0, places, kept)
