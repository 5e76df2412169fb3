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

        `accuracy` is that of the same samples, before the step. Both are scaled such that the mean
        over the ranks is the mean over all labelled samples, however they are spread.
        """
        features = self.backbone(batch.crops[0])
        logits = self.classify(features)
        known = batch.labels >= 0
        scale = self.world.size / self.world.all_reduce(known.sum().float()).clamp(min=1)
        loss = F.cross_entropy(
            logits, batch.labels, ignore_index=-1, reduction="sum", label_smoothing=self.smoothing
        )
        right = ((logits.detach().argmax(1) == batch.labels) & known).sum()
        return Output(loss * scale, {"accuracy": right * scale}, features, logits)

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the classes, in float32."""
        logits: Tensor = self.classifier(self.backbone.activation(features)).float()
        return logits
