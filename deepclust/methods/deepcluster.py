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
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deepclust.methods.base import Batch, Method, Targets
from deepclust.models.heads import CentroidHead, LinearHead
from deepclust.world import derive


class DeepCluster(Method):
    """Backbone and classifier, with the paper's loss: mean cross-entropy to the pseudo-labels."""

    def __init__(self, backbone: nn.Module, k: int, dim: int, head: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.policy = head
        features = int(backbone.dim)  # type: ignore[arg-type]
        self.head: nn.Module = (
            CentroidHead(features, dim, k) if head == "centroids" else LinearHead(features, k)
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the head's logits against `batch.targets[0]`."""
        features = self.backbone(batch.images)
        if self.policy != "centroids":
            features = self.backbone.activate(features)  # type: ignore[operator]
        return {"loss": F.cross_entropy(self.head(features).float(), batch.targets[0])}

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """The backbone's features, before the last ReLU where the backbone ends in one."""
        return self.backbone(images)  # type: ignore[no-any-return]

    def adopt(self, targets: Targets, seed: int) -> Bool[Tensor, "k"]:
        """Renew the head for a round, by policy; the draws depend on (seed, round) only."""
        if isinstance(self.head, CentroidHead):
            assert targets.whitening is not None
            self.head.adopt(targets.whitening, torch.from_numpy(targets.centroids[0].copy()))
            return torch.zeros(targets.centroids.shape[1], dtype=torch.bool)
        kept = targets.kept if self.policy == "match" else None
        fresh = torch.ones(targets.centroids.shape[1], dtype=torch.bool)
        if kept is not None:
            fresh = torch.from_numpy(~kept)
        self.head.reset(derive(seed, "head", targets.round), fresh)  # type: ignore[operator]
        return fresh

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """The head has an optimizer of its own, re-created with it."""
        return {"body": list(self.backbone.parameters()), "head": list(self.head.parameters())}
