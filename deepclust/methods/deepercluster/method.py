"""DeeperCluster: classify an image into its turned super-cluster, and there into its sub-cluster.

Caron et al., "Unsupervised Pre-Training of Image Features on Non-Curated Data", ICCV 2019, section
3.2. The reference implementation is facebookresearch/DeeperCluster. An image of super-cluster c (of
m), turned by q quarters, is of super-class s = 4 c + q. Inside its super-cluster it is of
sub-cluster z. The loss is -log p(s | x) - log p(z | s, x), a softmax over all (s, z) in two
factors. The four turns of an image share z but not the classifier of z.

The reference gives each rank one turn and one super-cluster, with a process group for each. Here
batches are mixed and all sub-classifiers are one packed head (`parts/sharded_head.py`), so any
number of ranks will do. m = 1 without turns is DeepCluster. One sub-cluster in each is RotNet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Output, Setting, Targets
from deepclust.methods.deepercluster.config import Config
from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.parts.sharded_head import SubHead
from deepclust.models.backbone import Backbone
from deepclust.world import derive


class Method(base.Method):
    """Backbone, a classifier of super-classes, and one of sub-clusters for each of them."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, Config)
        assert cluster is not None
        self.rotations = config.rotations
        self.supers, self.subs = cluster.supers, cluster.k // cluster.supers
        classes = cluster.supers * config.rotations
        self.super_head = LinearHead(backbone.dim, classes, seed=setting.seed)
        self.sub_head = SubHead(backbone.dim, classes, self.subs, setting.world, seed=setting.seed)

    def classes(self, batch: Batch) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """Return super-class s and sub-cluster z of every image."""
        cluster_ids = batch.pseudo_labels[0]
        supers = cluster_ids.div(self.subs, rounding_mode="floor")
        return supers * self.rotations + batch.turns, cluster_ids % self.subs

    def loss(self, batch: Batch) -> Output:
        """Return -log p(s | x) - log p(z | s, x).

        The logits are those over super-classes.
        """
        s, z = self.classes(batch)
        features = self.backbone(batch.crops[0])
        active = self.backbone.activation(features)
        logits = self.super_head(active).float()
        outer = F.cross_entropy(logits, s)
        inner = self.sub_head(active, s, z)
        scalars = {"super": outer.detach(), "sub": inner.detach()}
        return Output(outer + inner, scalars, features, logits)

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b s"]:
        """Return logits over super-classes, which are those of `loss`."""
        logits: Tensor = self.super_head(self.backbone.activation(features)).float()
        return logits

    @torch.no_grad()
    def adopt(self, targets: Targets, seed: int) -> dict[str, Bool[Tensor, " rows"]]:
        """Renew the heads.

        With one super-cluster the outer head classifies turns, and stays.
        """
        self.sub_head.reset(derive(seed, "sub", targets.round))
        if self.supers > 1:
            self.super_head.reset(derive(seed, "head", targets.round))
        return {
            f"{head}.{name}": torch.ones(len(parameter), dtype=torch.bool)
            for head in self.renewed()
            for name, parameter in self.get_submodule(head).named_parameters()
        }

    def renewed(self) -> tuple[str, ...]:
        """Return the heads that have an optimizer apart, renewed with them."""
        return ("sub_head", "super_head") if self.supers > 1 else ("sub_head",)
