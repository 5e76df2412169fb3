"""Count, sum and second moment of rows about a fixed pivot: PCA in D x D memory, not n x D.

Moments of parts merge exactly (float64 adds), so chunks can be extracted by any rank in any order.
The pivot, a row near the mean, is subtracted before squaring. `faiss.PCAMatrix` squares first and
subtracts n * mean * mean' in float32 afterwards, which cancels when the mean is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from deepclust.clustering.precision import full_precision

BLOCK = 4096  # rows of one float32 product; longer sums would lose digits before float64
MIRROR = 256  # rows handled in float64 at a time
# of columns; the outer product is symmetric, so each is taken from its diagonal on. Files of chunks
# have them so: another number could not read those of a run that is under way
PANELS = 8


@dataclass
class Moments:
    """Sums over rows x of (x - pivot) and of its outer product, on the device of the pivot."""

    count: int
    pivot: Float32[Tensor, " D"]
    sum: Float64[Tensor, " D"]
    outer: Float64[Tensor, "D D"]  # the part above the diagonal counts

    @classmethod
    def zero(cls, pivot: Float[Tensor, " D"]) -> Moments:
        """Return the moments of no rows.

        The pivot should be near the mean of the rows to come.
        """
        total = torch.zeros_like(pivot, dtype=torch.float64)
        return cls(0, pivot.float(), total, torch.outer(total, total))

    def add(self, rows: Float[Tensor, "n D"]) -> Moments:
        """Add rows in place: float32 products of 4096 rows (no TF32), summed in float64.

        The last digits depend on where blocks start: equal bits need rows cut at the same places,
        as chunks of extraction are.
        """
        with full_precision():
            for block in torch.split(rows, BLOCK):
                centred = block.to(self.pivot) - self.pivot
                for part in torch.split(centred, MIRROR):  # torch makes them float64 to add them
                    self.sum += part.sum(0, dtype=torch.float64)
                for panel in _panels(len(self.pivot)):
                    right = centred[:, panel.start :]
                    self.outer[panel, panel.start :] += centred[:, panel].T @ right
        self.count += len(rows)
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the rows of `other` in place.

        Both must have the same pivot.
        """
        assert torch.equal(self.pivot, other.pivot.to(self.pivot)), "moments about two pivots"
        self.count += other.count
        self.sum += other.sum.to(self.sum)
        self.outer += other.outer.to(self.outer)
        return self

    def packed(self) -> Float64[Tensor, " p"]:
        """Return the panels of the outer product, one after the other: 9/16 of its D x D numbers.

        `unpacked` makes the outer product of them.
        """
        panels = _panels(len(self.pivot))
        return torch.cat([self.outer[panel, panel.start :].flatten() for panel in panels])

    def mean(self) -> Float64[Tensor, " D"]:
        """Return the mean row."""
        return self.pivot.double() + self.sum / max(self.count, 1)

    def covariance(self) -> Float64[Tensor, "D D"]:
        """Return the covariance (divided by n): E[yy'] - E[y]E[y]', y = x - pivot.

        Only one D x D array is made: at D = 4096 each takes 134 MB.
        """
        covariance = self.outer / max(self.count, 1)
        for row in range(0, len(covariance), MIRROR):
            block = covariance[row : row + MIRROR, row : row + MIRROR]
            block.copy_(block.triu() + block.triu(1).T)
            covariance[row + MIRROR :, row : row + MIRROR] = (
                covariance[row : row + MIRROR, row + MIRROR :].T
            )  # fmt: skip
        shift = self.sum / max(self.count, 1)
        return covariance.addr_(shift, shift, alpha=-1)


def unpacked(packed: Float64[Tensor, " p"], dim: int) -> Float64[Tensor, "D D"]:
    """Return the outer product whose panels `Moments.packed` gave, with zeros below them."""
    outer, place = packed.new_zeros(dim, dim), 0
    for panel in _panels(dim):
        block = outer[panel, panel.start :]
        block.copy_(packed[place : place + block.numel()].view(block.shape))
        place += block.numel()
    return outer


def _panels(dim: int) -> Iterator[slice]:
    """Return the rows of each panel of a D x D array."""
    width = -(-dim // PANELS)
    return (slice(start, start + width) for start in range(0, dim, width))
