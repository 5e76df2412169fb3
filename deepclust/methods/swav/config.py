"""What SwAV declares, and the keys of its section: most of them are Suave's too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class SwappedSection(MethodSection):
    """Swapped assignments between crops, of any number of prototypes."""

    whole_batch: ClassVar[bool] = True
    full_crops: ClassVar[int] = 2
    local_crops: ClassVar[bool] = True

    temperature: float = Field(0.1, gt=0, description="of the predictions")
    epsilon: float = Field(
        0.05, gt=0, description="of the assignments; smaller, such as 0.03, is sharper"
    )
    iterations: int = Field(3, ge=1, description="of Sinkhorn-Knopp, in every step")
    hidden: int = Field(2048, ge=1, description="width of the projection head's hidden layer")
    out: int = Field(128, ge=1, description="dimensions of the projection")
    queue: int = Field(
        0, ge=0, description="past images that assignments are balanced with; for small batches"
    )
    queue_from: float = Field(15.0, ge=0, description="the epoch from which on the queue is used")
    freeze: float = Field(1.0, ge=0, description="epochs in which the prototypes keep still")

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops, and the queue of both full-size crops."""
        return replace(super().cost(recipe, width), fixed=8 * self.out * self.queue)

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the freezing or the queue, if anything."""
        epochs = recipe.train.epochs
        if self.freeze >= epochs:
            return (
                f"method.freeze: the prototypes would keep still in all {epochs} epochs: set less"
            )
        if self.queue and self.queue_from >= epochs:
            return (
                f"method.queue_from: the queue would not be used in {epochs} epochs: set less, or "
                "queue=0"
            )
        return None


class Config(SwappedSection):
    """SwAV (Caron et al. 2020): swapped assignments between crops."""

    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"

    name: Literal["swav"] = "swav"
    prototypes: int = Field(3000, ge=2, description="clusters, learned by gradient")

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of the number of prototypes."""
        return math.log(self.prototypes)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops, the queue, and the prototypes."""
        cost = super().cost(recipe, width)
        return replace(cost, fixed=cost.fixed + 4 * self.out * self.prototypes)
