"""What Suave declares, and the keys of its section: SwAV's, and the prior over the prototypes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from deepclust.methods.parts.class_prototypes import ClassPrototypes
from deepclust.methods.swav.config import SwappedSection
from deepclust.recipe.declare import Cost

if TYPE_CHECKING:
    from deepclust.recipe import Recipe

Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Config(ClassPrototypes, SwappedSection):
    """Suave (Fini et al. 2023): SwAV whose prototypes are the classes of a few labels."""

    name: Literal["suave"] = "suave"
    prior: Literal["uniform", "learned"] | tuple[Share, ...] = Field(
        "uniform",
        description="shares of the unlabelled images that the prototypes shall have: equal ones, "
        "those that the network predicts, or a number for each class and free prototype",
    )
    prior_momentum: float = Field(0.99, ge=0, lt=1, description="of the learned prior, in a step")

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return SwAV's, with prototypes for classes and free ones, and the learned prior."""
        one = 4 * (self.out + (1 if self.prior == "learned" else 0))
        cost = super().cost(recipe, width)
        return replace(cost, fixed=cost.fixed + one * self.free, per_class=one)
