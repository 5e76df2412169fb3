"""What MoCo v3 declares, and the keys of its section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Pass
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """MoCo v3 (Chen et al. 2021)."""

    whole_batch: ClassVar[bool] = True
    least: ClassVar[int] = 2
    full_crops: ClassVar[int] = 2

    name: Literal["moco-v3"] = "moco-v3"
    temperature: float = Field(1.0, gt=0, description="the reference: 1 for ResNets, 0.2 for ViTs")
    momentum: float = Field(0.99, ge=0, le=1, description="of the teacher at first, then up to 1")
    hidden: int = Field(4096, ge=1, description="width of both heads' hidden layers")
    out: int = Field(256, ge=1, description="dimensions of the projection")
    layers: int = Field(
        2, ge=1, le=4, description="linear layers of the projection; the reference: 3 for ViTs"
    )
    predictor_norm: bool = Field(
        False, description="end the predictor in a batch norm; the reference: true for ViTs"
    )
    freeze_patches: bool = Field(
        False, description="keep a ViT's patch projection as it was drawn, for stability"
    )

    def chance_loss(self, recipe: Recipe) -> float:
        """Return 2 T ln G for either crop, of a batch of G images."""
        return 4 * self.temperature * math.log(recipe.train.batch)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return two trained crops, and two of the teacher."""
        size = recipe.data.size
        return Cost((Pass("backbone", 2, size), Pass("teacher.backbone", 2, size, trained=False)))
