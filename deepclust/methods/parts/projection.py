"""The projection head of contrastive and self-distilling methods."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from deepclust.world import derive


def projection(widths: list[int], seed: int) -> nn.Sequential:
    """Return linear layers with batch norm and ReLU between them, drawn from the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "projection"))
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            last = len(layers) == 3 * (len(widths) - 2)
            layers.append(nn.Linear(before, after, bias=last))
            layers += [] if last else [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
