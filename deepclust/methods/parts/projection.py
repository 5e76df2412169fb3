"""The projection and prediction heads of contrastive and self-distilling methods."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from deepclust.world import derive


def projection(
    widths: list[int], seed: int, *, norms: bool = True, last_norm: bool = False
) -> nn.Sequential:
    """Return linear layers with batch norm and ReLU between them, drawn from the seed only.

    Without `norms` there is only a ReLU between them (MoCo v2). With `last_norm` the last layer
    too is followed by a batch norm, one without scale and shift (SimCLR v2, MoCo v3).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "projection"))
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths), 1):
            last = number == len(widths) - 1
            layers.append(nn.Linear(before, after, bias=not last_norm if last else not norms))
            if last:
                layers += [nn.BatchNorm1d(after, affine=False)] if last_norm else []
            else:
                layers += [nn.BatchNorm1d(after)] if norms else []
                layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
