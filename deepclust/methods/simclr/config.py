"""What SimCLR declares, and the keys of its section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """SimCLR (Chen et al. 2020)."""

    whole_batch: ClassVar[bool] = True
    full_crops: ClassVar[int] = 2

    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.5, gt=0)
    hidden: int = Field(2048, ge=1, description="width of the projection head's hidden layers")
    out: int = Field(128, ge=1, description="dimensions of the projection")
    layers: int = Field(2, ge=1, le=4, description="linear layers of the projection head")

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of the number of other crops in the batch."""
        return math.log(2 * recipe.train.batch - 1)
