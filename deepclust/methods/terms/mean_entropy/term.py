"""Entropy of the mean prediction: answers are spread over all classes, so none stays unused.

Joulin and Bach, "A Convex Relaxation for Weakly Supervised Classifiers", ICML 2012, section 2.2.
Also "mean entropy maximisation" of PAWS (Assran et al., ICCV 2021). Let p be the mean softmax over
the samples of all ranks. The term is sum over classes of p ln p = -H(p), between -ln k and 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from deepclust.methods.terms.term import Term as Contract

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output


class Term(Contract):
    """Minus the entropy of the mean prediction of the global batch."""

    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return sum p ln p of the mean softmax of `output.logits`."""
        assert output.logits is not None
        probabilities = output.logits.float().softmax(1)
        mean = method.world.all_gather_rows(probabilities).mean(0)
        minus_entropy: Tensor = torch.special.xlogy(mean, mean).sum()
        return minus_entropy
