"""What MoCo v2 declares, and the keys of its section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Pass
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """MoCo v2 (Chen et al. 2020)."""

    least: ClassVar[int] = 2
    full_crops: ClassVar[int] = 2

    name: Literal["moco-v2"] = "moco-v2"
    temperature: float = Field(0.2, gt=0)
    momentum: float = Field(0.999, ge=0, le=1, description="of the key encoder")
    queue: int = Field(65536, ge=1, description="keys of past images, the negatives")
    hidden: int = Field(2048, ge=1, description="width of the projection head's hidden layer")
    out: int = Field(128, ge=1, description="dimensions of the projection")
    groups: int = Field(
        8,
        ge=1,
        description="least number of parts, over all ranks, in which shuffled keys are normed",
    )

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of the number of keys that a query is compared with."""
        return math.log(1 + self.queue)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return one trained crop and one of the key encoder, and the queue."""
        size = recipe.data.size
        passes = (Pass("backbone", 1, size), Pass("teacher.backbone", 1, size, trained=False))
        return Cost(passes, fixed=4 * self.queue * self.out)
