"""DAC: pairs of images that are surely alike or surely not train a network to answer alike or not.

Chang et al., "Deep Adaptive Image Clustering", ICCV 2017, eq. 3 to 7 and algorithm 1. Written from
the formulas.

A label feature is l = softmax(z) / |softmax(z)|, and a similarity s_ij = l_i . l_j in [0, 1]. Pairs
of the global batch with s >= u count as of one cluster, and pairs with s < l as of two. The others
are left out, fewer with every epoch, until u and l meet. The clusters are the argmax of z.

Where this differs. The paper gives no normaliser. Here the loss is the mean over the selected
pairs, which is stable where the mean over all pairs is not. An image and itself are left out (s = 1
has no gradient). Similarities are clamped before the logarithm. The optimizer is that of the
recipe, not RMSprop. The authors' code selects all pairs by one threshold, and repeats chunks of the
data with frozen targets. This is the algorithm of the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deepclust.data.to_device import constant
from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting
from deepclust.methods.dac.config import Config
from deepclust.methods.parts.monitors import prototypes_used, target_entropies
from deepclust.models.backbone import Backbone
from deepclust.world import World, derive

SURE = 1e-6  # similarities stay so far from 0 and 1 in the logarithms
IDENTITIES = 2  # layers of the label network that begin as the identity


class Method(base.Method):
    """Backbone, and the label network on it."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.config = config
        self.projection = label_network(backbone.dim, config.clusters, setting.seed)

    def loss(self, batch: Batch) -> Output:
        """Return the mean cross-entropy of the selected pairs of the global batch."""
        features = self.backbone(batch.crops[0])
        logits = self.classify(features)
        upper, lower = self.thresholds(batch.now)
        loss, shares = pair_loss(label_features(logits), self.world, upper, lower)
        signs = {**target_entropies(logits.softmax(1), self.world), **prototypes_used(logits)}
        return Output(loss, {**shares, **signs}, features, logits)

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the clusters, none of them negative."""
        logits: Tensor = self.projection(self.backbone.activation(features))
        return logits.float()

    # the epoch's number is not compiled: what it says would be compiled again for every epoch
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def thresholds(self, now: Now) -> Float[Tensor, " 2"]:
        """Return the upper and the lower threshold, on the device."""
        return constant(self.config.thresholds(int(now.epochs)), self.world.device)


def label_network(width: int, clusters: int, seed: int) -> nn.Sequential:
    """Return layers from features to z >= 0, each followed by a batch norm and a ReLU.

    The first is drawn from the seed, the other two begin as the identity (section 4.3 of the
    paper). With both, random images have s of about 0.46, just where the lower threshold begins.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "projection"))
        layers = [nn.Linear(width, clusters)]
    for _ in range(IDENTITIES):
        layers.append(nn.Linear(clusters, clusters))
        nn.init.eye_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
    normed = [(layer, nn.BatchNorm1d(clusters), nn.ReLU()) for layer in layers]
    return nn.Sequential(*(module for three in normed for module in three))


def label_features(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Return the rows softmax(z), scaled to length 1 (eq. 5), in float32."""
    return F.normalize(logits.float().softmax(1))


def select(
    similarities: Float[Tensor, "b g"], upper: Float[Tensor, ""], lower: Float[Tensor, ""]
) -> tuple[Bool[Tensor, "b g"], Bool[Tensor, "b g"]]:
    """Return which pairs count as of one cluster, and which as of two (eq. 6)."""
    return similarities >= upper, similarities < lower


def pair_loss(
    own: Float[Tensor, "b k"], world: World, upper: Float[Tensor, ""], lower: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the loss of this rank's label features with those of all ranks, and the shares.

    b is equal on every rank. A pair of one cluster costs -log s, a pair of two -log(1 - s). The
    mean over the ranks is the mean over the selected pairs of the global batch, in float32.
    `selected` is their share of all pairs, and `alike` the share of them that is of one cluster.
    """
    with torch.autocast(own.device.type, enabled=False):
        others = world.all_gather_rows(own)
        similarities = own @ others.T
        alike, apart = select(similarities.detach(), upper, lower)
        rows = torch.arange(len(own), device=own.device)
        alike[rows, rows + world.rank * len(own)] = False  # an image and itself
        known = similarities.clamp(SURE, 1 - SURE)
        costs = torch.where(alike, -known.log(), 0.0) + torch.where(apart, -(-known).log1p(), 0.0)
        counts = torch.stack([alike.sum(), (alike | apart).sum()]).double()
        one, both = world.all_reduce(counts).clamp(min=1).float()
        loss = costs.sum() * world.size / both
    pairs = len(others) * max(1, len(others) - 1)
    return loss, {"selected": both / pairs, "alike": one / both}
