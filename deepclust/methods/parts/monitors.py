"""Signs of collapse, as scalars of the metrics: a network that gives all images the same answer.

`spread` is that of BYOL and SimSiam (Chen and He 2021, section 4.1). The two entropies are those of
DINO (Caron et al. 2021, section 5.3): its targets collapse to one dimension without the centre,
to uniform without sharpening. `deepclust.run.collapse` says which values are bad.

No value goes into the loss. All are on the device, and nobody waits for them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.world import World

Scalars = dict[str, Float[Tensor, ""]]


@torch.no_grad()
def spread(projected: Float[Tensor, "b d"]) -> Scalars:
    """Return `spread`: the mean standard deviation of unit rows in a dimension, times sqrt(d).

    It is near 1 for rows that point everywhere, and 0 for rows that all point one way. Of this
    rank's rows, of which a single one tells nothing.
    """
    rows = F.normalize(projected.detach().float())
    if len(rows) < 2:
        return {}
    return {"spread": rows.std(0).mean() * math.sqrt(rows.shape[1])}


@torch.no_grad()
def target_entropies(targets: Float[Tensor, "b k"], world: World) -> Scalars:
    """Return entropies of targets (rows of sum 1), as shares of ln k.

    `mean_entropy` is the mean of the rows' entropies: 1 if every target is uniform, so that it
    tells nothing. `entropy_of_mean` is that of the mean over all ranks' rows: 0 if all images have
    one target. Of few rows that are sharp it is at most ln(rows) / ln k.
    """
    rows = targets.detach().float()
    most = math.log(max(2, rows.shape[1]))
    count = rows.new_full((1,), float(len(rows)))
    sums = world.all_reduce(torch.cat([rows.sum(0), count]))
    return {
        "mean_entropy": torch.special.entr(rows).sum(1).mean() / most,
        "entropy_of_mean": torch.special.entr(sums[:-1] / sums[-1]).sum() / most,
    }


@torch.no_grad()
def prototypes_used(scores: Float[Tensor, "b k"]) -> Scalars:
    """Return `prototypes_used`: how many prototypes are the nearest of a row, as a share.

    The share is that of the largest number possible, which is k or the rows of this rank.
    """
    rows, k = scores.shape
    used = torch.zeros(k, device=scores.device)
    used[scores.detach().argmax(1)] = 1.0
    return {"prototypes_used": used.sum() / min(k, rows)}
