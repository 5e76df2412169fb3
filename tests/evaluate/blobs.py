"""Rows around one random centre a class: labelled features whose difficulty is the noise."""

from __future__ import annotations

import numpy as np

Split = tuple[np.ndarray, np.ndarray]


def blobs(n: int, classes: int = 4, dim: int = 16, noise: float = 0.5, seed: int = 0) -> Split:
    """Features float32 [n, dim] and labels int64 [n]; the centres do not depend on n or seed."""
    centres = np.random.default_rng(1).normal(size=(classes, dim))
    random = np.random.default_rng(seed + 2)
    labels = random.integers(0, classes, n)
    rows = centres[labels] + noise * random.normal(size=(n, dim))
    return rows.astype(np.float32), labels


def splits(n: int = 400, noise: float = 0.5, **shape: int) -> tuple[Split, Split]:
    """A training split of n rows and a test split of half as many."""
    return blobs(n, noise=noise, seed=0, **shape), blobs(n // 2, noise=noise, seed=1, **shape)
