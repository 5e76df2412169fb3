"""Random numbers that depend on (key, position, draw number) alone: a counter-based hash.

A whole batch is computed at once, which costs nothing per image. The numbers depend neither on
reader processes nor on ranks nor on restarts.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(key: int, positions: Int64[np.ndarray, " b"], count: int) -> Float64[np.ndarray, "b m"]:
    """Return `count` numbers in [0, 1) for every position, each a hash of (key, position, number).

    A larger count adds columns and leaves the others as they are.
    """
    streams = hashed(np.asarray(positions, np.uint64) ^ hashed(np.array([key], np.uint64)))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits: UInt64[np.ndarray, "b m"] = hashed(streams[:, None] + steps)
    return (bits >> np.uint64(11)) * 2.0**-53


def hashed(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Return the finaliser of splitmix64 (Steele et al., 2014), a bijection of 64-bit numbers."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
