"""DINO's head: three layers to a bottleneck, unit rows, and a last layer of unit rows.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, section 3.2
and appendix C. The reference implementation is `DINOHead` of facebookresearch/dino.

The reference draws all weights from N(0, 0.02), which is fan_in^-1/2 for its 2048 inputs. With a
fixed 0.02 a small head has a bottleneck of nearly zero, whose gradient is huge after the division
by its norm. So here the deviation is fan_in^-1/2 for any width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.world import derive


class Head(nn.Module):
    """Features [b, dim] to scores [b, k], drawn from the seed only."""

    def __init__(
        self, dim: int, hidden: int, bottleneck: int, k: int, *, unit_last: bool, seed: int
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(derive(seed, "head"))
        self.layers = nn.Sequential(
            _linear(dim, hidden, random),
            nn.GELU(),
            _linear(hidden, hidden, random),
            nn.GELU(),
            _linear(hidden, bottleneck, random),
        )
        self.last = UnitLinear(bottleneck, k, random, unit=unit_last)

    def project(self, features: Float[Tensor, "b dim"]) -> Float[Tensor, "b d"]:
        """Return the unit rows of the bottleneck, in float32."""
        return F.normalize(self.layers(features).float())

    def forward(self, features: Float[Tensor, "b dim"]) -> Float[Tensor, "b k"]:
        """Return scores."""
        scores: Tensor = self.last(self.project(features))
        return scores


class UnitLinear(nn.Module):
    """A linear layer with weight normalisation and without bias: scale * w / |w|.

    `unit` fixes the scale [k, 1] at 1, so scores of unit rows are cosines.
    """

    def __init__(self, dim: int, k: int, random: torch.Generator, *, unit: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, dim, generator=random) / dim**0.5)
        self.scale = None if unit else nn.Parameter(torch.ones(k, 1))

    def forward(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Return scores in float32, also under autocast: they are divided by small numbers."""
        with torch.autocast(rows.device.type, enabled=False):
            weight = F.normalize(self.weight)
            return F.linear(rows, weight if self.scale is None else self.scale * weight)


def _linear(before: int, after: int, random: torch.Generator) -> nn.Linear:
    """Return a layer of weights N(0, 1 / before), cut at two deviations, and of bias 0."""
    layer = nn.Linear(before, after)
    deviation = before**-0.5
    nn.init.trunc_normal_(
        layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=random
    )
    nn.init.zeros_(layer.bias)
    return layer
