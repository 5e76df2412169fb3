"""Training on labels: cross-entropy of a linear classifier on the labelled samples of a batch.

All samples go through the network, so that terms see those without a label. With `terms.cm` it is
SuperCM (see there), with `terms.vat` or `terms.pseudo_label` it is those methods.

The loss is the mean over the labelled samples of all ranks. The code of SuperCM divides by all
samples instead, so at a share of one half its cross-entropy counts half. With `train.accumulate`
it is the mean over one part.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Output, Setting
from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.supervised.config import Config
from deepclust.models.backbone import Backbone


class Method(base.Method):
    """Backbone and a linear classifier of the seeds' classes."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.smoothing = config.smoothing
        self.classifier = LinearHead(backbone.dim, len(setting.classes), seed=setting.seed)

    def loss(self, batch: Batch) -> Output:
        """Return the mean cross-entropy of labelled samples, 0 for a batch without any.

        `accuracy` is that of the same samples, before the step. That of a mixture is whether the
        class of its larger part is the answer. Both are scaled such that the mean
        over the ranks is the mean over all labelled samples, however they are spread.
        """
        features = self.backbone(batch.crops[0])
        logits = self.classify(features)
        known = batch.labelled
        scale = self.world.size / self.world.all_reduce(known.sum().float()).clamp(min=1)
        labels, wanted = batch.labels, batch.labels
        if batch.soft is not None:  # rows of zeros have no loss
            labels, wanted = batch.soft.argmax(1), batch.soft
        loss = self.entropy(logits, wanted)
        right = ((logits.detach().argmax(1) == labels) & known).sum()
        return Output(loss * scale, {"accuracy": right * scale}, features, logits)

    def entropy(self, logits: Float[Tensor, "b k"], wanted: Tensor) -> Float[Tensor, ""]:
        """Return the sum of cross-entropies to classes [b], -1 for none, or shares of them [b, k].

        Smoothing spreads over the classes of the rows that have some.
        """
        if wanted.ndim == 2:
            classes, given = wanted.shape[1], wanted.sum(1, keepdim=True)
            wanted = (1 - self.smoothing) * wanted + self.smoothing / classes * given
            return -(wanted * logits.log_softmax(1)).sum()
        return F.cross_entropy(
            logits, wanted, ignore_index=-1, reduction="sum", label_smoothing=self.smoothing
        )

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the classes, in float32."""
        logits: Tensor = self.classifier(self.backbone.activation(features)).float()
        return logits
