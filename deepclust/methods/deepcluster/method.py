"""DeepCluster: classify every image into the cluster that the last round put it in.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018, eq. 1 and
2. The reference implementation is facebookresearch/deepcluster. There are three head policies:
`reset` draws a new classifier every round, as the paper does. `match` keeps the rows of clusters
that continue an old one. `centroids` learns no classifier: its rows are the round's centroids, as
in DeepCluster-v2 of facebookresearch/swav, but behind this round's whitening.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Output, Setting, Targets
from deepclust.methods.deepcluster.config import Config
from deepclust.methods.parts.heads import CentroidHead, LinearHead
from deepclust.models.backbone import Backbone
from deepclust.world import derive


class Method(base.Method):
    """Backbone and classifier, with the paper's loss: mean cross-entropy to the pseudo-labels."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, Config)
        assert cluster is not None
        self.policy = config.head
        self.head: LinearHead | CentroidHead
        if config.head == "centroids":
            self.head = CentroidHead.empty(backbone.dim, cluster.dim, cluster.k)
        else:
            self.head = LinearHead(backbone.dim, cluster.k, seed=setting.seed)

    def loss(self, batch: Batch) -> Output:
        """Return the cross-entropy of the head's logits against the pseudo-labels of head 0."""
        features = self.backbone(batch.crops[0])
        logits = self.classify(features)
        return Output(F.cross_entropy(logits, batch.pseudo_labels[0]), {}, features, logits)

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the clusters."""
        if isinstance(self.head, LinearHead):
            features = self.backbone.activation(features)
        logits: Tensor = self.head(features).float()
        return logits

    @torch.no_grad()
    def adopt(self, targets: Targets, seed: int) -> dict[str, Bool[Tensor, " k"]]:
        """Renew the head for a round, by policy.

        The draws depend on (seed, round) only.
        """
        if isinstance(self.head, CentroidHead):
            assert targets.whitening is not None
            self.head.take(targets.whitening, targets.centroids[0])
            return {}
        rows = torch.ones(targets.centroids.shape[1], dtype=torch.bool)
        if self.policy == "match" and targets.kept is not None:
            rows = torch.from_numpy(~targets.kept[0])
        self.head.reset(derive(seed, "head", targets.round), rows.nonzero().flatten())
        return {"head.weight": rows, "head.bias": rows}

    def renewed(self) -> tuple[str, ...]:
        """Return the classifier, which has an optimizer apart, renewed with it."""
        return ("head",)
