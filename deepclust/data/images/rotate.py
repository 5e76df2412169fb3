"""Quarter turns: DeeperCluster's self-supervised labels (Caron et al., 2019, section 3.1).

Whole uint8 batches are turned, in a worker or on the device. No pixel changes its value. Which
turn a position gets is a hash of (key, position), as for all crops.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from deepclust.data.images.draws import uniform
from deepclust.data.to_device import send


def quarters(key: int, positions: Int64[np.ndarray, " b"], count: int) -> Int64[np.ndarray, " b"]:
    """Draw a number of quarter turns in [0, count) for every position."""
    return (uniform(key, positions, 1)[:, 0] * count).astype(np.int64)


def rotate(
    images: UInt8[Tensor, "b 3 s s"], quarters: Int64[Tensor, " b"]
) -> UInt8[Tensor, "b 3 s s"]:
    """Turn every image counter-clockwise by its quarters * 90 degrees, in a copy.

    Quarters may lie on the CPU for images on a GPU. Then nothing waits for the GPU.
    """
    turned, drawn = images.clone(), quarters.cpu().numpy() % 4
    chosen = send([np.flatnonzero(drawn == turns) for turns in (1, 2, 3)], images.device)
    for turns, rows in enumerate(chosen, 1):
        turned.index_copy_(0, rows, images.index_select(0, rows).rot90(turns, (2, 3)))
    return turned
