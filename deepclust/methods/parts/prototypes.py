"""Learned prototypes: a linear layer without bias whose rows are unit vectors before each step.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, section 3.1. The rows are set to length one between steps, not in the forward pass. So their
gradient is that of a plain matrix product, as in the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.world import derive


class Prototypes(nn.Module):
    """Unit rows [b, d] to scores [b, k]: cosines, while the prototypes [k, d] are unit rows.

    The first prototypes are random directions, which depend on the seed only.
    """

    def __init__(self, dim: int, k: int, *, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(derive(seed, "prototypes"))
        self.weight = nn.Parameter(torch.randn(k, dim, generator=random))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Set all rows to length one, in place."""
        self.weight.copy_(F.normalize(self.weight))

    def forward(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Return scores in float32, also under autocast: they are divided by small numbers."""
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.float(), self.weight)
