"""Entropy of the mean prediction: answers are spread over all classes, so none stays unused.

Joulin and Bach, "A Convex Relaxation for Weakly Supervised Classifiers", ICML 2012, section 2.2.
Also "mean entropy maximisation" of PAWS (Assran et al., ICCV 2021), hence the first name of the
term, `mean_entropy`. Let p be the mean softmax over the samples of all ranks. The term is

    sum over classes of p ln p - p ln(k prior) = KL(p || prior) - ln k

Its least value is -ln k, at p = prior. A uniform prior, the default, gives -H(p).

A mean over few samples is noisy, and its entropy too small. With a queue, p is the mean over the
present batch and past ones. The past has no gradient. The present has, in expectation, that of a
batch as large as all of them. So the weight means the same with and without a queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.terms.batch_entropy.config import Config
from deepclust.methods.terms.term import Term as Contract
from deepclust.recipe.sections import TermSection

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output, Setting

LEAST = torch.finfo(torch.float32).tiny  # a share of which a logarithm is taken


class Term(Contract):
    """Minus the entropy of the mean prediction of the global batch, relative to the prior.

    `past` are the means of the last batches [queue, k], the newest last, zeros where there was
    none. How many classes there are is known from the first batch on, [queue, 0] before.
    """

    past: Tensor | None

    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        super().__init__(config, width, setting)
        assert isinstance(config, Config)
        self.prior = config.prior
        self.register_buffer("past", torch.zeros(config.queue, 0) if config.queue else None)

    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the term of the mean softmax of `output.logits`."""
        assert output.logits is not None
        probabilities = output.logits.float().softmax(1)
        mean = method.world.all_gather_rows(probabilities).mean(0)
        if self.past is not None:
            mean = self._with_past(self.past, mean)
        value: Tensor = torch.special.xlogy(mean, mean.clamp_min(LEAST)).sum()
        return value if self.prior is None else value - (mean * self._log_prior(mean)).sum()

    def _with_past(self, past: Tensor, mean: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Return the mean over the present and the past, with the gradient of the present."""
        now = mean.detach()
        if past.shape[1] == 0:
            past = now.new_zeros(len(past), len(now))
        total = past.sum(0) + now
        if self.training:
            self.past = torch.cat([past[1:], now[None]])
        return mean + (total / total.sum() - now)

    def _log_prior(self, mean: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        assert self.prior is not None
        if len(self.prior) != len(mean):
            raise RecipeError(
                f"terms: a prior of {len(self.prior)} numbers for the {len(mean)} classes that "
                f"the method answers: give {len(mean)} numbers"
            )
        prior = mean.new_tensor(self.prior)
        return (prior / prior.mean()).log()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the past of a checkpoint, whose number of classes is not known before it."""
        saved = state.get(f"{prefix}past")
        if self.past is not None and saved is not None and len(saved) == len(self.past):
            self.past = self.past.new_zeros(saved.shape)
        super()._load_from_state_dict(state, prefix, *rest)
