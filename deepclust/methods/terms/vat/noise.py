"""Normal random numbers for every sample of a batch, on its device: a counter-based hash.

They depend on (key, sample, number) alone, so ranks and restarts make no difference. It is the
hash of `deepclust.data.images.draws` in torch: for whole images a CPU would be too slow.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def normal(key: int, samples: Int64[Tensor, " b"], count: int) -> Float[Tensor, "b count"]:
    """Return `count` standard normal numbers for each sample: a sample that repeats has the same.

    The uniform numbers have 23 bits, of the middle of each interval, so none is 0 or 1.
    """
    device = samples.device
    streams = hashed(samples ^ hashed(torch.full((), key, device=device)))
    steps = torch.arange(1, count + 1, device=device) * _GOLDEN
    bits = _shifted(hashed(streams[:, None] + steps), 41)
    centred = (2 * bits + 1 - 2**23).float() * 2.0**-23
    drawn: Tensor = torch.erfinv(centred) * 2**0.5
    return drawn


def hashed(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Return the finaliser of splitmix64 (Steele et al., 2014), of signed numbers that wrap."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift to the right and fill with zeros."""
    kept: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return kept
