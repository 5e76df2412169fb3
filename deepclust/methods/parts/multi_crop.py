"""Multi-crop: some full-size crops and some small ones, through one network.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, section 3.3. Crops of one size go through the network as one batch, as in the reference. So a
batch norm sees all crops of a size together, and the network runs once for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor


def each_size(
    crops: Sequence[Float[Tensor, "b 3 s s"]], network: Callable[[Tensor], Tensor]
) -> Float[Tensor, "rows D"]:
    """Return the network's rows of all crops, crop after crop: [len(crops) * b, D].

    Crops of a size lie together in a batch, since a method declares them kind by kind.
    """
    groups = [torch.cat(list(group)) for _, group in groupby(crops, key=lambda one: one.shape[-1])]
    return torch.cat([network(group) for group in groups])


def by_crop(rows: Float[Tensor, "rows d"], crops: int) -> Float[Tensor, "crops b d"]:
    """Return rows that lie crop after crop as one batch for each crop."""
    return rows.view(crops, -1, rows.shape[1])


def swapped(
    targets: Float[Tensor, "first b k"], logits: Float[Tensor, "crops b k"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all pairs of a target and the logits of another crop.

    The targets are those of the first crops, which have logits as well. With two targets and V
    crops there are 2 V - 2 pairs.
    """
    predicted = logits.log_softmax(2)
    others = predicted.sum(0) - predicted[: len(targets)]  # of all crops but the target's own
    pairs = len(targets) * (len(logits) - 1)
    return -(targets * others).sum(2).mean(1).sum() / pairs
