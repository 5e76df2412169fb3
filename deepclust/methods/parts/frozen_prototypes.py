"""Prototypes that a round gives and no gradient moves: the centroids of all its heads."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from deepclust.errors import RecipeError
from deepclust.world import derive


class FrozenPrototypes(nn.Module):
    """Unit rows [b, d] to logits [heads, b, k]: z c^T / temperature.

    These are DeepCluster-v2's (facebookresearch/swav, `main_deepclusterv2.py`). The largest logit
    of a row is its cluster by spherical k-means. The centroids [heads, k, d] are a frozen,
    persistent buffer, 4 heads k d bytes: 4.6 MB for 3 x 3000 x 128.
    """

    centroids: Tensor

    def __init__(self, shape: tuple[int, int, int], temperature: float, seed: int) -> None:
        super().__init__()
        self.temperature = temperature
        random = torch.Generator().manual_seed(derive(seed, "prototypes"))
        drawn = torch.randn(shape, generator=random)  # until the first round
        self.register_buffer("centroids", functional.normalize(drawn, dim=2))

    @torch.no_grad()
    def take(self, centroids: Float[np.ndarray, "heads k d"]) -> None:
        """Copy a round's centroids; raise `RecipeError` for those of another kind of run."""
        wanted = tuple(self.centroids.shape)
        if centroids.shape != wanted:
            raise RecipeError(
                f"the round's centroids are {centroids.shape} and the method's {wanted} (heads, "
                "clusters, dimensions): init.assignments must name a round of such a run"
            )
        self.centroids.copy_(torch.from_numpy(np.array(centroids, np.float32)))

    def forward(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "heads b k"]:
        """Return the logits in float32, under autocast too."""
        with torch.autocast(rows.device.type, enabled=False):
            return rows.float() @ self.centroids.mT / self.temperature
