"""The clustering module: soft k-means about the means of labelled classes.

Boubekki et al., "Joint optimization of an autoencoder for clustering and embedding", Machine
Learning 2021. SuperCM fixes the centroids to class means: Singh et al., "SuperCM: Improving
Semi-Supervised Learning and Domain Adaptation through differentiable clustering", Pattern
Recognition 2025, eq. 1 and 2.

Let x be the features of a row, g the softmax of its logits over the classes, m the class means.
Eq. 1 has three parts: reconstruction, variance, cross terms. Their sum is sum over k of
g_k |x - m_k|^2, because g sums to one. That is what is computed. It is divided by the dimensions,
as in the authors' code. The paper divides by rows alone, so its beta is `weight` / dimensions.

We differ in three points. A mean counts the rows of that class: eq. 2 as printed divides by all
labelled rows, which shrinks it, and the code by the number of steps. Means are of the features that
this step trains on, detached, of all ranks: a pass in eval mode would read running statistics.
A class that no row has had yet takes no part.

g comes from the method's classifier where its answers are the classes, as in SuperCM. Elsewhere it
is a linear layer that belongs to the term, which alone trains it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.terms.cm.config import Config
from deepclust.methods.terms.term import Term as Contract
from deepclust.recipe.sections import TermSection
from deepclust.world import World, derive

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output, Setting


class Term(Contract):
    """Class means [C, D] with their row counts [C], and the energy of rows about them."""

    means: Tensor
    counts: Tensor

    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        super().__init__(config, width, setting)
        assert isinstance(config, Config)
        self.momentum, self.norm = config.momentum, config.norm
        classes = len(setting.classes)
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))
        self.own: LinearHead | None = None
        if setting.config.answers != "classes":
            self.own = LinearHead(width, classes, seed=derive(setting.seed, "cm"))

    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the mean energy of this rank's rows, 0 while no class has a row.

        The means take this step's labelled rows in first. float32, autocast or not.
        """
        assert output.features is not None
        with torch.autocast(output.features.device.type, enabled=False):
            features = output.features.float()
            if self.norm:
                features = normed(features, method.world)
            means = self._follow(features.detach(), batch.labels, method.world)
            seen = self.counts > 0
            logits = output.logits if self.own is None else self.own(features)
            assert logits is not None
            logits = logits[:, : len(means)].float()  # free prototypes of a method come last
            shares = logits.masked_fill(~seen & seen.any(), -torch.inf).softmax(1)
            return energy(features, shares, means) * seen.any()

    @torch.no_grad()
    def _follow(
        self, features: Float[Tensor, "b D"], labels: Int64[Tensor, " b"], world: World
    ) -> Float[Tensor, "C D"]:
        """Take the labelled rows of all ranks into the means of their classes."""
        classes = len(self.means)
        one_hot = F.one_hot(labels.where(labels >= 0, classes), classes + 1)[:, :classes].float()
        sums = world.all_reduce(torch.cat([one_hot.T @ features, one_hot.sum(0)[:, None]], 1))
        rows = sums[:, -1:]
        counts = self.counts + rows[:, 0].long()
        share = rows / counts.clamp(min=1)[:, None]
        if self.momentum is not None:
            share = torch.where(self.counts[:, None] > 0, 1 - self.momentum, 1.0) * (rows > 0)
        step: Tensor = share * (sums[:, :-1] / rows.clamp(min=1) - self.means)
        means = self.means + step
        self.means.copy_(means)
        self.counts.copy_(counts)
        return means


def energy(
    features: Float[Tensor, "b D"], shares: Float[Tensor, "b C"], means: Float[Tensor, "C D"]
) -> Float[Tensor, ""]:
    """Return the mean over rows and dimensions of sum_k shares_k (features - means_k)^2.

    Rows of shares sum to one. Squares are expanded about the middle of the means, so no tensor
    [b, C, D] is needed and little is lost to rounding.
    """
    middle = means.mean(0)
    x, m = features - middle, means - middle
    squares = (x * x).sum(1) - 2 * (x * (shares @ m)).sum(1) + shares @ (m * m).sum(1)
    return squares.mean() / features.shape[1]


def normed(features: Float[Tensor, "b D"], world: World) -> Float[Tensor, "b D"]:
    """Return features of mean 0 and variance 1 in the batch of all ranks, as a batch norm does."""
    rows = world.all_gather_rows(features)
    variance, mean = torch.var_mean(rows, 0, correction=0)
    return (features - mean) * (variance + 1e-5).rsqrt()
