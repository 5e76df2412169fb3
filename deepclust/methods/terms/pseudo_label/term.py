"""Pseudo-Label: cross-entropy of an unlabelled sample to its own answer, where that is sure.

Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural
Networks", ICML workshop 2013. The threshold is that of Oliver et al., "Realistic Evaluation of Deep
Semi-Supervised Learning Algorithms", NeurIPS 2018.

The targets are plain one-hot classes. Oliver et al. take ten times the one-hot vector as logits of
a target, which is nearly the same. A port of it takes ten times the vector as probabilities, which
weighs sure rows tenfold. SuperCM copied that, so its weights do not carry over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.methods.terms.pseudo_label.config import Config
from deepclust.methods.terms.term import Term as Contract
from deepclust.recipe.sections import TermSection

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output, Setting


class Term(Contract):
    """Mean over all rows of the cross-entropy to sure answers; other rows count 0."""

    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        super().__init__(config, width, setting)
        assert isinstance(config, Config)
        self.threshold = config.threshold

    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the term of `output.logits`, for rows that have no label of the seeds."""
        assert output.logits is not None
        logits = output.logits.float()
        sure, targets = logits.detach().softmax(1).max(1)
        used = (sure > self.threshold) & ~batch.labelled
        return (F.cross_entropy(logits, targets, reduction="none") * used).mean()
