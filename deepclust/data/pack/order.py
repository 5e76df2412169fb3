"""Which image of a source comes into which shard, at which place: fixed before any is read."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from deepclust.world import generator

_FEWEST_SHARDS = 16  # so that a small data set has blocks to shuffle and to divide over ranks
_LARGEST_SHARD = 10_000  # samples: about 1 GB of ImageNet


def shuffled(n: int, seed: int = 0) -> Int64[np.ndarray, " n"]:
    """Return the order in which n images of a source follow each other in the shards."""
    return generator(seed, "pack").permutation(n).astype(np.int64)


def shard_borders(n: int, shard_size: int | None = None) -> Int64[np.ndarray, " shards_plus_1"]:
    """Return where shards begin and end whose numbers of samples differ by at most one.

    Each has `shard_size` samples at most.
    """
    shards = min(n, max(_FEWEST_SHARDS, -(-n // _LARGEST_SHARD)))
    if shard_size is not None:
        shards = -(-n // shard_size)
    return np.linspace(0, n, shards + 1).astype(np.int64)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"
