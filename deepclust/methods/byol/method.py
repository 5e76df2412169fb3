"""BYOL: predict the teacher's projection of the other crop, without any negative.

Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020 (arXiv 2006.07733), eq. 2 and section 3.2.
The reference implementation is deepmind-research/byol. Nothing but the predictor and the teacher
without gradients keeps all projections from becoming the same. `spread` in the metrics tells: near
1 it works, near 0 it has collapsed. As in the reference the trained network is exported, not the
teacher. Each crop has its own pass, with its own batch statistics.

Blur and solarisation differ between the two crops, which are lists in the recipe: `data.blur` and
`data.solarise` (appendix B).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting
from deepclust.methods.byol.config import Config
from deepclust.methods.parts.monitors import spread
from deepclust.methods.parts.projection import projection
from deepclust.methods.parts.teacher import Teacher, cosine_momentum
from deepclust.models.backbone import Backbone
from deepclust.world import derive


class Method(base.Method):
    """Backbone, projection and predictor, and the moving averages of the first two."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.momentum = config.momentum
        self.projection = projection([backbone.dim, config.hidden, config.out], setting.seed)
        self.predictor = projection(
            [config.out, config.hidden, config.out], derive(setting.seed, "predictor")
        )
        self.teacher = Teacher(backbone=backbone, projection=self.projection)

    def loss(self, batch: Batch) -> Output:
        """Return the distance of both predictions to the teacher's other crop."""
        features = [self.backbone(crop) for crop in batch.crops]
        projected = [self.projection(self.backbone.activation(part)) for part in features]
        a, b = (self.predictor(part) for part in projected)
        taught_a, taught_b = (self.taught(crop) for crop in batch.crops)
        loss = distance(a, taught_b) + distance(b, taught_a)
        return Output(loss, spread(projected[0]), features[0])

    @torch.no_grad()
    def taught(self, crop: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Return the teacher's projections of a crop."""
        backbone, head = map(self.teacher.get_submodule, ("backbone", "projection"))
        taught: Tensor = head(self.backbone.activation(backbone(crop)))
        return taught

    def after_step(self, now: Now) -> None:
        """Let the teacher follow, with a momentum that rises to 1."""
        momentum = cosine_momentum(self.momentum, now.progress)
        self.teacher.follow(momentum, backbone=self.backbone, projection=self.projection)


def distance(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Mean squared distance of unit rows, 2 - 2 cos, in [0, 4] (eq. 2), in float32."""
    with torch.autocast(a.device.type, enabled=False):
        return 2 - 2 * F.cosine_similarity(a.float(), b.float()).mean()
