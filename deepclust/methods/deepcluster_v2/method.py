"""DeepCluster-v2: every crop predicts the cluster that its image had when it was last seen.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, appendix on DeepCluster-v2. The reference implementation is `main_deepclusterv2.py` of
facebookresearch/swav. A crop's projection is scaled to length 1. A round clusters, once for each
head, the projections that training has left in the bank, and its centroids are the classifier. The
loss is the mean cross-entropy of all crops in all heads, at temperature 0.1.

We differ in this. The bank is first filled by one pass over centre crops in evaluation mode, not
over augmented ones in training mode. Head h clusters the rows of full-size crop h modulo 2, as
there. It starts from rows of all ranks, and leaves no cluster empty. Epochs may be uniform over
the clusters (`sampling`), which theirs are not.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting, Targets
from deepclust.methods.deepcluster_v2.config import FULL, Config
from deepclust.methods.parts.bank import Bank
from deepclust.methods.parts.frozen_prototypes import FrozenPrototypes
from deepclust.methods.parts.monitors import spread
from deepclust.methods.parts.multi_crop import each_size
from deepclust.methods.parts.projection import projection
from deepclust.models.backbone import Backbone


class Method(base.Method):
    """Backbone and projection, the bank of projections, and the round's centroids."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, Config)
        assert cluster is not None
        widths = [backbone.dim, *[config.hidden] * (config.layers - 1), config.out]
        self.projection = projection(widths, setting.seed)
        self.bank = Bank(setting.samples, FULL, config.out, setting.world)
        shape = (config.heads, cluster.k, config.out)
        self.prototypes = FrozenPrototypes(shape, config.temperature, setting.seed)

    def loss(self, batch: Batch) -> Output:
        """Return the mean cross-entropy of all crops, in all heads."""
        features = each_size(batch.crops, self.backbone)
        rows = self._project(features)
        logits = self.prototypes(rows)
        targets = batch.pseudo_labels.repeat(1, len(batch.crops))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        b = len(batch.sample_ids)
        self.bank.note(batch.sample_ids, rows[: FULL * b].reshape(FULL, b, -1))
        return Output(loss, spread(rows[:b]), features[:b], logits[0, :b])

    def clustered(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return projections of length 1."""
        return self._project(self.embed(images))

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the clusters of head 0."""
        logits: Tensor = self.prototypes(self._project(features))[0]
        return logits

    def adopt(self, targets: Targets, seed: int) -> dict[str, Bool[Tensor, " rows"]]:
        """Copy the centroids of all heads; nothing that is trained is renewed."""
        self.prototypes.take(targets.centroids)
        return {}

    def after_step(self, now: Now) -> None:
        """Write the rows of the step into the bank."""
        self.bank.flush()

    def _project(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b d"]:
        projected: Tensor = self.projection(self.backbone.activation(features))
        return F.normalize(projected.float())
