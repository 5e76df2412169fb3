"""DeepCluster: classify every image into the cluster that the last round put it in.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018, eq. 1 and
2; reference implementation facebookresearch/deepcluster. Head policies: `reset` draws a new
classifier every round (the paper); `match` keeps the rows of clusters that continue an old one;
`centroids` has no classifier to learn, its rows are the round's centroids (as DeepCluster-v2 in
facebookresearch/swav, but behind this round's whitening).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from deepclust.methods.base import Batch, Method, Setting, Targets
from deepclust.methods.parts.heads import CentroidHead, LinearHead
from deepclust.models.backbone import Backbone
from deepclust.recipe.sections import DeepClusterSection
from deepclust.world import derive


class DeepCluster(Method):
    """Backbone and classifier, with the paper's loss: mean cross-entropy to the pseudo-labels."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, DeepClusterSection)
        assert cluster is not None
        self.backbone = backbone
        self.policy = config.head
        self.head: LinearHead | CentroidHead
        if config.head == "centroids":
            width, dim = backbone.dim, cluster.dim
            empty = torch.zeros(width), torch.zeros(width, dim), torch.zeros(cluster.k, dim)
            self.head = CentroidHead(*empty)
        else:
            self.head = LinearHead(backbone.dim, cluster.k, seed=setting.seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the head's logits against `batch.targets[0]`."""
        features = self.backbone(batch.views[0])
        if isinstance(self.head, LinearHead):
            features = self.backbone.activation(features)
        return {"loss": F.cross_entropy(self.head(features).float(), batch.targets[0])}

    @torch.no_grad()
    def adopt(self, targets: Targets, seed: int) -> Bool[Tensor, " k"]:
        """Renew the head for a round, by policy; the draws depend on (seed, round) only."""
        k = targets.centroids.shape[1]
        if isinstance(self.head, CentroidHead):
            assert targets.whitening is not None
            self.head.mean.copy_(torch.from_numpy(targets.whitening.mean))
            self.head.matrix.copy_(torch.from_numpy(targets.whitening.matrix))
            self.head.centroids.copy_(torch.from_numpy(targets.centroids[0].copy()))
            return torch.zeros(k, dtype=torch.bool)
        fresh = torch.ones(k, dtype=torch.bool)
        if self.policy == "match" and targets.kept is not None:
            fresh = torch.from_numpy(~targets.kept[0])
        self.head.reset(derive(seed, "head", targets.round), fresh.nonzero().flatten())
        return fresh

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """The head has an optimizer of its own, re-created with it."""
        return {"body": list(self.backbone.parameters()), "head": list(self.head.parameters())}
