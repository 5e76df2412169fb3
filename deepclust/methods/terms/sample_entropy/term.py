"""Mean entropy of single predictions: every sample gets a decided answer.

Grandvalet and Bengio, "Semi-supervised Learning by Entropy Minimization", NeurIPS 2004. The term is
the mean over samples of H(softmax), between 0 and ln k. Beside `batch_entropy` of equal weight it
is minus the mutual information of sample and class, between -ln k and 0. Alone it is least where
all samples have one class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from deepclust.methods.terms.term import Term as Contract

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output


class Term(Contract):
    """The mean entropy of this rank's predictions."""

    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the mean over rows of H(softmax) of `output.logits`."""
        assert output.logits is not None
        logarithms = output.logits.float().log_softmax(1)
        return -(logarithms.exp() * logarithms).sum(1).mean()
