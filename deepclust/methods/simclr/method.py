"""SimCLR: of all views in the batch, find the other view of the same image.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, eq.
1 and algorithm 1; reference implementation google-research/simclr. NT-Xent over the 2 G normalised
projections of the global batch, both directions, itself left out, gathered over the ranks with
their gradients. Nothing is clustered. As in most re-implementations the projection ends without a
batch norm (the reference has one there).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.methods.base import Batch, Method, Needs, Setting
from deepclust.models.backbone import Backbone
from deepclust.recipe.sections import SimCLRSection
from deepclust.world import World, derive


class SimCLR(Method):
    """Backbone and projection head."""

    needs = Needs(views=2)

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        config = setting.config
        assert isinstance(config, SimCLRSection)
        self.backbone = backbone
        self.world, self.temperature = setting.world, config.temperature
        widths = [backbone.dim, *[config.hidden] * (config.layers - 1), config.out]
        self.projection = projection(widths, setting.seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """NT-Xent of the two views."""
        features = self.backbone.activation(self.backbone(torch.cat(batch.views)))
        a, b = F.normalize(self.projection(features).float()).chunk(2)
        return {"loss": nt_xent(a, b, self.world, self.temperature)}

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer: the projection is never renewed."""
        return {"body": list(self.parameters())}


def nt_xent(
    a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], world: World, temperature: float
) -> Float[Tensor, ""]:
    """Mean over this rank's 2 b unit rows of -log softmax(row . all others / T) at its partner.

    a and b are the two views of the same b images; equal b on every rank. The mean over the ranks,
    as DDP takes it of the gradients, is the loss of the global batch. float32, autocast or not.
    """
    with torch.autocast(a.device.type, enabled=False):
        keys = torch.cat([world.all_gather_rows(a), world.all_gather_rows(b)])
        logits = torch.cat([a, b]) @ keys.T / temperature
        half, own = len(keys) // 2, torch.arange(len(a), device=a.device) + world.rank * len(a)
        itself, partner = torch.cat([own, own + half]), torch.cat([own + half, own])
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        return F.cross_entropy(logits, partner)


def projection(widths: list[int], seed: int) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them; the weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "projection"))
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            last = len(layers) == 3 * (len(widths) - 2)
            layers.append(nn.Linear(before, after, bias=last))
            layers += [] if last else [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
