"""DeeperCluster: tell the turned super-cluster of an image, and inside it the sub-cluster.

Caron et al., "Unsupervised Pre-Training of Image Features on Non-Curated Data", ICCV 2019, section
3.2; reference implementation facebookresearch/DeeperCluster. An image of super-cluster c (of m),
turned by q quarters, is of super-class s = 4 c + q; inside its super-cluster it is of sub-cluster
z. The loss is -log p(s | x) - log p(z | s, x), a softmax over all (s, z) in two factors. The four
turns of an image share z but not the classifier of z.

The reference gives each rank one turn and one super-cluster, with a process group for each. Here
batches are mixed and all sub-classifiers are one packed head (`models/subhead.py`), so any number
of ranks will do. m = 1 without turns is DeepCluster; one sub-cluster in each is RotNet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from deepclust.methods.base import Batch, Method, Needs, Setting, Targets
from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.parts.sharded_head import SubHead
from deepclust.models.backbone import Backbone
from deepclust.recipe.sections import DeeperClusterSection
from deepclust.world import Owned, derive


class DeeperCluster(Method):
    """Backbone, a classifier of super-classes, and one of sub-clusters for each of them."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, DeeperClusterSection)
        assert cluster is not None
        self.backbone = backbone
        self.needs = Needs(rotations=config.rotations)
        self.supers, self.subs = cluster.supers, cluster.k // cluster.supers
        classes = cluster.supers * config.rotations
        self.super_head = LinearHead(backbone.dim, classes, seed=setting.seed)
        self.sub_head = SubHead(backbone.dim, classes, self.subs, setting.world, seed=setting.seed)

    def classes(self, batch: Batch) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """Super-class s and sub-cluster z of every image."""
        clusters = batch.targets[0].div(self.subs, rounding_mode="floor")
        return clusters * self.needs.rotations + batch.quarters, batch.targets[0] % self.subs

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-log p(s | x) - log p(z | s, x), and its two terms."""
        s, z = self.classes(batch)
        features = self.backbone.activation(self.backbone(batch.views[0]))
        outer = F.cross_entropy(self.super_head(features).float(), s)
        inner = self.sub_head(features, s, z)
        return {"loss": outer + inner, "super": outer.detach(), "sub": inner.detach()}

    @torch.no_grad()
    def adopt(self, targets: Targets, seed: int) -> Bool[Tensor, " k"]:
        """Renew the heads; with one super-cluster the outer one tells turns, and stays."""
        self.sub_head.reset(derive(seed, "sub", targets.round))
        if self.supers > 1:
            self.super_head.reset(derive(seed, "head", targets.round))
        return torch.ones(targets.centroids.shape[1], dtype=torch.bool)

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """What a round renews has an optimizer of its own, re-created with it."""
        body, head = list(self.backbone.parameters()), list(self.sub_head.parameters())
        (head if self.supers > 1 else body).extend(self.super_head.parameters())
        return {"body": body, "head": head}

    def owned(self) -> dict[str, Owned]:
        """The sub-head's rows are shared out over the ranks."""
        return {f"sub_head.{name}": slice_ for name, slice_ in self.sub_head.owned().items()}
