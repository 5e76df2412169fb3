"""SimCLR: among all crops of the batch, find the other crop of the same image.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, eq.
1 and algorithm 1. The reference implementation is google-research/simclr.

The loss is NT-Xent over the 2 G normalised
projections of the global batch, both directions, without the row itself. They are gathered over
the ranks with their gradients. Nothing is clustered. As in most re-implementations the projection
ends without a batch norm (the reference has one there).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Output, Setting
from deepclust.methods.parts.monitors import spread
from deepclust.methods.parts.projection import projection
from deepclust.methods.simclr.config import Config
from deepclust.models.backbone import Backbone
from deepclust.world import World


class Method(base.Method):
    """Backbone and projection head."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.temperature = config.temperature
        widths = [backbone.dim, *[config.hidden] * (config.layers - 1), config.out]
        self.projection = projection(widths, setting.seed)

    def loss(self, batch: Batch) -> Output:
        """Return NT-Xent of the two crops."""
        features = self.backbone(torch.cat(batch.crops))
        projected = self.projection(self.backbone.activation(features))
        a, b = F.normalize(projected.float()).chunk(2)
        loss = nt_xent(a, b, self.world, self.temperature)
        return Output(loss, spread(a), features[: len(batch.sample_ids)])


def nt_xent(
    a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], world: World, temperature: float
) -> Float[Tensor, ""]:
    """Mean over this rank's 2 b unit rows of -log softmax(row . all others / T) at its partner.

    a and b are the two crops of the same b images. b is equal on every rank. The mean over the
    ranks, as DDP takes it of the gradients, is the loss of the global batch. float32, autocast or
    not.
    """
    with torch.autocast(a.device.type, enabled=False):
        keys = torch.cat([world.all_gather_rows(a), world.all_gather_rows(b)])
        logits = torch.cat([a, b]) @ keys.T / temperature
        half, own = len(keys) // 2, torch.arange(len(a), device=a.device) + world.rank * len(a)
        itself, partner = torch.cat([own, own + half]), torch.cat([own + half, own])
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        return F.cross_entropy(logits, partner)
