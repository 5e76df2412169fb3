"""Where an evaluator computes: on a GPU when there is one and the work is worth the copy.

Small work stays on the CPU, with the numbers that it always had.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

WORTH = 2**33  # products of numbers: seconds on a CPU
PIECE = 65_536  # rows that are sent at once


def choose_device(products: int) -> torch.device:
    """Return the GPU for work of this many products, if there is one, else the CPU."""
    is_large = products >= WORTH and torch.cuda.is_available()
    return torch.device("cuda" if is_large else "cpu")


def sent_rows(
    features: Float[np.ndarray, "n d"], device: torch.device
) -> Iterator[Float[Tensor, "m d"]]:
    """Yield the rows on the device piece by piece, in float64 if they are, else in float32."""
    for start in range(0, len(features), PIECE):
        piece = np.array(features[start : start + PIECE])
        wide = torch.float64 if piece.dtype == np.float64 else torch.float32
        yield torch.from_numpy(piece).to(device).to(wide)


def standardised(
    features: Float[np.ndarray, "n d"], device: torch.device, like: Tensor | None = None
) -> tuple[Float32[Tensor, "n d"], Tensor]:
    """Return rows of mean 0 and deviation 1 a column, and these facts [2, d], to use as `like`.

    A column that is constant stays 0, as in scikit-learn.
    """
    facts = _facts(features, device) if like is None else like
    rows = torch.empty(features.shape, dtype=torch.float32, device=device)
    start = 0
    for piece in sent_rows(features, device):
        rows[start : start + len(piece)] = (piece.double() - facts[0]) / facts[1]
        start += len(piece)
    return rows, facts


def _facts(features: Float[np.ndarray, "n d"], device: torch.device) -> Tensor:
    """Return mean and deviation of every column, in float64, from two passes."""
    n, dim = features.shape
    mean, variance = torch.zeros(2, dim, dtype=torch.float64, device=device)
    for piece in sent_rows(features, device):
        mean += piece.double().sum(0) / n
    for piece in sent_rows(features, device):
        variance += (piece.double() - mean).square_().sum(0) / n
    tiny = 10 * n * torch.finfo(torch.float64).eps * mean.square()
    return torch.stack([mean, torch.where(variance > tiny, variance.sqrt(), 1.0)])
