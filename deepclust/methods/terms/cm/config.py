"""What the clustering module declares, and its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from deepclust.recipe.declare import Cost
from deepclust.recipe.sections import TermSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(TermSection):
    """The clustering module of SuperCM."""

    uses_labels: ClassVar[bool] = True

    momentum: float | None = Field(
        None, ge=0, lt=1,
        description="share of a class mean's last value kept; null: the mean of all rows so far",
    )  # fmt: skip
    norm: bool = Field(
        False, description="features about zero and of equal spread, so that they cannot shrink"
    )

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return the means and counts of classes, and where it has one the linear layer."""
        own = 0 if recipe.method.answers == "classes" else 4 * (width + 1)
        return Cost((), per_class=4 * width + 8 + own)
