"""Count, sum and second moment of rows about a fixed pivot: PCA in D x D memory, not n x D.

Moments of parts merge exactly (float64 adds), so chunks can be extracted by any rank in any order.
The pivot, a row near the mean, is subtracted before squaring. `faiss.PCAMatrix` squares first and
subtracts n * mean * mean' in float32 afterwards, which cancels when the mean is large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from deepclust.clustering.precision import full_precision

BLOCK = 4096  # rows of one float32 product; longer sums would lose digits before float64
MIRROR = 256  # rows handled in float64 at a time
PANELS = 8  # of columns; the outer product is symmetric, so each is taken from its diagonal on


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
        width = -(-len(self.pivot) // PANELS)
        with full_precision():
            for block in torch.split(rows, BLOCK):
                centred = block.to(self.pivot) - self.pivot
                for part in torch.split(centred, MIRROR):  # torch makes them float64 to add them
                    self.sum += part.sum(0, dtype=torch.float64)
                for a in range(0, len(self.pivot), width):
                    panel = slice(a, a + width)
                    self.outer[panel, a:] += centred[:, panel].T @ centred[:, a:]
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
