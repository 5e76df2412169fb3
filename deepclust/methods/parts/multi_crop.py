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
