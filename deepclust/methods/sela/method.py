"""SeLa, self-labelling: classify images into labels that the classifiers themselves give, balanced.

Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation learning",
ICLR 2020. The reference implementation is yukimasano/self-label (MIT). Every head is a linear layer
on the features, with its own labels. The loss is the mean over heads of the cross-entropy to
them (eq. 5, with the labels fixed). A round solves eq. 5 for the labels (`stages/round_sinkhorn`
says where it differs). Labels come from the heads' own answers, so heads go on as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deepclust.methods import base
from deepclust.methods.base import Batch, Output, Setting, Targets
from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.parts.monitors import spread
from deepclust.methods.parts.multi_crop import each_size
from deepclust.methods.sela.config import Config
from deepclust.models.backbone import Backbone
from deepclust.world import derive


class Method(base.Method):
    """Backbone and heads: H k (D + 1) weights, 245 MB for 10 x 3000 on 2048 features."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, Config)
        assert cluster is not None
        self.heads = nn.ModuleList(
            LinearHead(backbone.dim, cluster.k, seed=derive(setting.seed, "sela", head))
            for head in range(config.heads)
        )

    def loss(self, batch: Batch) -> Output:
        """Return the mean cross-entropy of all crops, in all heads."""
        features = each_size(batch.crops, self.backbone)
        active = self.backbone.activation(features)
        logits = [head(active).float() for head in self.heads]
        losses = [
            F.cross_entropy(row, labels.repeat(len(batch.crops)))
            for row, labels in zip(logits, batch.pseudo_labels, strict=True)
        ]
        b = len(batch.sample_ids)
        signs = spread(active[:b])
        return Output(torch.stack(losses).mean(), signs, features[:b], logits[0][:b])

    def clustered(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Return what the heads get: features after the last activation."""
        active: Tensor = self.backbone.activation(self.embed(images))
        return active

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the clusters of head 0."""
        logits: Tensor = self.heads[0](self.backbone.activation(features)).float()
        return logits

    def scorer(self) -> dict[str, Tensor]:
        """Return the weights of all heads."""
        heads = [head for head in self.heads if isinstance(head, LinearHead)]
        return {
            name: torch.stack([getattr(head, name).detach() for head in heads])
            for name in ("weight", "bias")
        }

    def adopt(self, targets: Targets, seed: int) -> dict[str, Bool[Tensor, " rows"]]:
        """Take the labels in; the heads that gave them go on."""
        return {}
