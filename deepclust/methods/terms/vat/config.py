"""What virtual adversarial training declares, and its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Pass
from deepclust.recipe.sections import TermSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(TermSection):
    """Answers should not change in the direction in which they change most."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"

    eps: float = Field(
        6.0, gt=0,
        description="length of the change to an image, over all normalised pixels and channels",
    )  # fmt: skip
    xi: float = Field(
        1e-2, gt=0, description="length of the change by which the direction is looked for"
    )
    iterations: int = Field(1, ge=1, description="of the power method that looks for it")

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return the first crop's passes: the answer, each search, and the one that is trained."""
        size = recipe.data.size
        searches = Pass("backbone", self.iterations + 1, size)
        return Cost((Pass("backbone", 1, size, trained=False), searches))
