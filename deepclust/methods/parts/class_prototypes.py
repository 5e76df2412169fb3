"""What Suave and Daino declare: a prototype for each class of the seeds, and free ones.

The first prototypes are the classes, in the order of the seeds, and the free ones come after them.
Nothing here imports torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class ClassPrototypes(MethodSection):
    """Keys and declarations of a method whose first prototypes are the classes of the seeds."""

    labels: ClassVar[Literal["unused", "optional", "required"]] = "required"
    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "classes"

    mixes: ClassVar[bool] = True

    free: int = Field(0, ge=0, description="prototypes for what no label names, beside the classes")
    smoothing: float = Field(
        0.01, ge=0, lt=1, description="share of a label that all classes have in equal parts"
    )

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the loss with two classes, the fewest; `guess` gets how many there are."""
        return self.guess(recipe, 2)

    def guess(self, recipe: Recipe, classes: int) -> float:
        """Return the logarithm of the number of prototypes."""
        return math.log(max(2, classes + self.free))
