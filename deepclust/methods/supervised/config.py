"""What training on labels declares, and the keys of its section."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """Cross-entropy on the labelled samples; terms may use the others."""

    labels: ClassVar[Literal["unused", "optional", "required"]] = "required"
    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "classes"

    mixes: ClassVar[bool] = True

    name: Literal["supervised"] = "supervised"
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a label that all classes have in equal parts"
    )

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of two classes, the fewest; `guess` knows how many."""
        return math.log(2)

    def guess(self, recipe: Recipe, classes: int) -> float:
        """Return the logarithm of the number of classes."""
        return math.log(max(2, classes))

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return one crop, and a linear classifier: float32, with its bias."""
        return replace(super().cost(recipe, width), per_class=4 * (width + 1))
