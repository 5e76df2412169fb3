"""What BYOL declares, and the keys of its section."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Pass
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """BYOL (Grill et al. 2020)."""

    least: ClassVar[int] = 2
    full_crops: ClassVar[int] = 2

    name: Literal["byol"] = "byol"
    momentum: float = Field(0.996, ge=0, le=1, description="of the teacher at first, then up to 1")
    hidden: int = Field(4096, ge=1, description="width of both heads' hidden layer")
    out: int = Field(256, ge=1, description="dimensions of the projection")

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the distance of two pairs of orthogonal unit rows."""
        return 4.0

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return two trained crops, and two of the teacher."""
        size = recipe.data.size
        return Cost((Pass("backbone", 2, size), Pass("teacher.backbone", 2, size, trained=False)))
