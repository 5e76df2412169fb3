"""Virtual adversarial training: answers keep still where a small change moves them most.

Miyato et al., "Virtual Adversarial Training: A Regularization Method for Supervised and
Semi-Supervised Learning", TPAMI 2018, eq. 5 to 12. Let p(x) be the answer to an image, without
gradient. The direction is g / |g|, where g is the gradient at r = xi d of KL(p(x) || p(x + r)) with
respect to r. The term is KL(p(x) || p(x + eps g / |g|)). The implementation of Oliver et al., and
with it SuperCM, takes the other order of the KL divergence.

The forward passes run inside the method's own forward, so that DistributedDataParallel sees one
graph, and its gradient buckets fill once. The search differentiates by r alone and touches no
gradient of a parameter. Batch norms use the batch's statistics, and leave the running ones alone.
Dropout draws the same masks in every pass, or the passes would differ by more than r.

All is float32, under autocast too: with xi = 1e-2 and bfloat16 the direction is rounding noise. So
p(x) is computed again, although the method knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.methods.parts.still_norms import still_norms
from deepclust.methods.terms.term import Term as Contract
from deepclust.methods.terms.vat.config import Config
from deepclust.methods.terms.vat.noise import normal
from deepclust.recipe.sections import TermSection
from deepclust.world import derive

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output, Setting

Answer = Callable[[Tensor], Tensor]


class Term(Contract):
    """The mean divergence of answers to images and to their virtual adversaries."""

    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        super().__init__(config, width, setting)
        assert isinstance(config, Config)
        self.config, self.seed = config, setting.seed

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the term of the first crop, of labelled and unlabelled samples alike."""
        images, config = batch.crops[0].float(), self.config
        step = derive(self.seed, "vat", batch.now.step)
        answer = answering(method, derive(step, "dropout", method.world.rank), images.device)
        with still_norms(method), torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = answer(images).log_softmax(1)
            samples = batch.sample_ids.to(images.device, non_blocking=True)
            noise = normal(step, samples, images[0].numel())
            change = unit(noise.view_as(images))
            for _ in range(config.iterations):
                change = steepest(answer, images, wanted, config.xi * change)
            return divergence(wanted, answer(images + config.eps * change)) / len(images)


def answering(method: Method, seed: int, device: torch.device) -> Answer:
    """Return the map from images to logits, with the same dropout at every call."""

    def answer(images: Tensor) -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return method.classify(method.backbone(images)).float()

    return answer


def steepest(
    answer: Answer, images: Tensor, wanted: Float[Tensor, "b k"], change: Tensor
) -> Tensor:
    """Return unit changes of images in which answers leave `wanted` fastest, seen from `change`.

    A row whose answer does not change at all has 0.
    """
    with torch.enable_grad():
        change = change.detach().requires_grad_()
        (slope,) = torch.autograd.grad(divergence(wanted, answer(images + change)), change)
    return unit(slope)


def divergence(wanted: Float[Tensor, "b k"], logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Return the sum over rows of KL(wanted || softmax(logits)). `wanted` are log-probabilities."""
    return F.kl_div(logits.log_softmax(1), wanted, reduction="sum", log_target=True)


def unit(rows: Tensor) -> Tensor:
    """Return each sample's numbers, scaled to length one over all of them.

    They are first divided by the largest, since squares of the slopes of sure answers underflow.
    """
    flat = rows.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    return F.normalize(flat).view_as(rows)
