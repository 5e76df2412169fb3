"""MoCo v3: among the batch's images, find the teacher's other crop of the same one.

Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021 (arXiv
2104.02057), algorithm 1. There is no queue. A prediction of either crop is compared with the
teacher's projections of the other crop of all ranks' images. These keys share their batch
statistics and need no shuffle. As in the reference (facebookresearch/moco-v3) the query's backbone
is what is exported. Each crop has its own pass, with its own batch statistics.

For a ViT `freeze_patches` keeps the random patch projection (section 4.3). The reference also has
fixed sine positions and its own draw of the patch projection, which are not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting
from deepclust.methods.moco_v3.config import Config
from deepclust.methods.parts.monitors import spread
from deepclust.methods.parts.projection import projection
from deepclust.methods.parts.teacher import Teacher, cosine_momentum
from deepclust.models.backbone import Backbone
from deepclust.world import World, derive

PATCHES = ("conv_proj", "patch_embed")  # torchvision's name of a ViT's patch projection, and timm's


class Method(base.Method):
    """Backbone, projection and predictor, and the moving averages of the first two."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.config = config
        widths = [backbone.dim, *[config.hidden] * (config.layers - 1), config.out]
        self.projection = projection(widths, setting.seed, last_norm=True)
        self.predictor = projection(
            [config.out, config.hidden, config.out],
            derive(setting.seed, "predictor"),
            last_norm=config.predictor_norm,
        )
        self.teacher = Teacher(backbone=backbone, projection=self.projection)
        self._patches = patch_names(backbone) if config.freeze_patches else ()

    def loss(self, batch: Batch) -> Output:
        """Return the contrast of both crops, each with the teacher's other one."""
        features = [self.backbone(crop) for crop in batch.crops]
        projected = [self.projection(self.backbone.activation(part)) for part in features]
        a, b = (F.normalize(self.predictor(part).float()) for part in projected)
        taught_a, taught_b = (self.taught(crop) for crop in batch.crops)
        losses = [
            contrast(queries, keys, self.world, self.config.temperature)
            for queries, keys in ((a, taught_b), (b, taught_a))
        ]
        scale = 2 * self.config.temperature
        return Output(scale * (losses[0] + losses[1]), spread(projected[0]), features[0])

    @torch.no_grad()
    def taught(self, crop: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Return the teacher's unit projections of a crop."""
        backbone, head = map(self.teacher.get_submodule, ("backbone", "projection"))
        return F.normalize(head(self.backbone.activation(backbone(crop))).float())

    def frozen(self, now: Now) -> tuple[str, ...]:
        """Return a ViT's patch projection, where the recipe keeps it still."""
        return self._patches

    def after_step(self, now: Now) -> None:
        """Let the teacher follow, with a momentum that rises to 1."""
        momentum = cosine_momentum(self.config.momentum, now.progress)
        self.teacher.follow(momentum, backbone=self.backbone, projection=self.projection)


def contrast(
    queries: Float[Tensor, "b d"], keys: Float[Tensor, "b d"], world: World, temperature: float
) -> Float[Tensor, ""]:
    """Mean of -log softmax(query . all ranks' keys / T) at its own image's key, for unit rows.

    b is equal on every rank. The mean over the ranks is the loss of the global batch.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ world.all_gather_rows(keys).T / temperature
        own = torch.arange(len(queries), device=queries.device) + world.rank * len(queries)
        return F.cross_entropy(logits, own)


def patch_names(backbone: Backbone) -> tuple[str, ...]:
    """Return the parameters of a ViT's patch projection, or raise RecipeError without one."""
    names = tuple(
        f"backbone.{name}"
        for name, _ in backbone.named_parameters()
        if set(PATCHES) & set(name.split("."))
    )
    if not names:
        raise RecipeError(
            f"method.freeze_patches: {backbone.name} has no patch projection; it is for a ViT, so "
            "leave it out"
        )
    return names
