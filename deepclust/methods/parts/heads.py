"""Heads that give logits over pseudo-labels: a trained linear layer, or the centroids."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from deepclust.clustering.whiten import Whitening
from deepclust.world import derive


class LinearHead(nn.Linear):
    """Features [b, dim] to logits [b, k], weights N(0, 0.01), bias 0, as in DeepCluster's main.py.

    The weights depend on the seed only, never on the rank, the device or the global generator.
    """

    def __init__(self, dim: int, k: int, *, seed: int) -> None:
        super().__init__(dim, k)
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int, rows: Int64[Tensor, " m"] | None = None) -> None:
        """Draw the head again, or only these rows (policy `match`: all others keep theirs).

        A row's draw does not depend on which others are drawn. The parameters stay the same
        objects. The optimizer's state of the rows is not touched.
        """
        random = torch.Generator().manual_seed(derive(seed, "head"))
        fresh = torch.randn(self.weight.shape, generator=random).mul_(0.01).to(self.weight)
        chosen = slice(None) if rows is None else rows.to(self.weight.device)
        self.weight[chosen] = fresh[chosen]
        self.bias[chosen] = 0.0


class CentroidHead(nn.Module):
    """Logits from the round's own clustering: normalise((f - mean) W) c^T / temperature.

    These are DeepCluster-v2's frozen prototypes (SwAV repository, `main_deepclusterv2.py`), behind
    a round's whitening. A sample's largest logit is its k-means assignment when the centroids
    c [k, d] are unit rows. Everything is a frozen, persistent buffer: mean [D], matrix W [D, d].
    """

    mean: Tensor
    matrix: Tensor
    centroids: Tensor

    def __init__(
        self,
        mean: Float[Tensor, " D"],
        matrix: Float[Tensor, "D d"],
        centroids: Float[Tensor, "k d"],
        *,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("matrix", matrix.float().clone())
        self.register_buffer("centroids", centroids.float().clone())

    @classmethod
    def empty(cls, width: int, dim: int, k: int) -> CentroidHead:
        """Return a head of this shape that gives zeros."""
        return cls(torch.zeros(width), torch.zeros(width, dim), torch.zeros(k, dim))

    @torch.no_grad()
    def take(self, whitening: Whitening, centroids: Float[np.ndarray, "k d"]) -> None:
        """Copy a round's whitening and centroids."""
        self.mean.copy_(torch.from_numpy(whitening.mean))
        self.matrix.copy_(torch.from_numpy(whitening.matrix))
        self.centroids.copy_(torch.from_numpy(centroids.copy()))

    def forward(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits in float32, also under autocast: whitening stretches small differences."""
        with torch.autocast(features.device.type, enabled=False):
            white = (features.float() - self.mean) @ self.matrix
            return functional.normalize(white, dim=1) @ self.centroids.T / self.temperature
