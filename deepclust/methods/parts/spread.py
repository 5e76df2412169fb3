"""How far projections are from a collapse: the spread of unit rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def spread(rows: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return the mean standard deviation of the unit rows' dimensions, times sqrt(d).

    It is near 1 for rows in all directions and 0 for rows that are all the same (Chen and He,
    "Exploring Simple Siamese Representation Learning", CVPR 2021, figure 2). float32.
    """
    unit = F.normalize(rows.float())
    return unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5
