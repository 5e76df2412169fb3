"""What DINO declares, and the keys of its section: most of them are Daino's too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Pass
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class TaughtSection(MethodSection):
    """A student predicts what its teacher says, with a last layer of any width."""

    trunk: ClassVar[str] = "teacher.backbone"
    full_crops: ClassVar[int] = 2
    local_crops: ClassVar[bool] = True

    hidden: int = Field(2048, ge=1, description="width of the head's two hidden layers")
    bottleneck: int = Field(256, ge=1, description="width before the last layer")
    unit_last: bool = Field(True, description="rows of the last layer keep length one")
    freeze: float = Field(1.0, ge=0, description="epochs in which the last layer keeps still")
    momentum: float = Field(
        0.996, ge=0, le=1, description="of the teacher at first; it rises to 1 by a cosine"
    )
    centre_momentum: float = Field(0.9, ge=0, le=1, description="of the centre; 1: no centre")
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0, description="smaller is sharper")
    teacher_temperature_start: float = Field(0.04, gt=0, description="at the first epoch")
    teacher_warmup: float = Field(
        0.0, ge=0, description="epochs in which the teacher's temperature goes from its start"
    )

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops for the student, and two for its teacher."""
        students = super().cost(recipe, width).passes
        return Cost((*students, Pass("teacher.backbone", 2, recipe.data.size, trained=False)))

    @property
    def per_prototype(self) -> int:
        """Bytes of a prototype: its row of the last layer, perhaps its scale, and its centre."""
        return 4 * (self.bottleneck + (1 if self.unit_last else 2))

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the freezing, if anything."""
        epochs = recipe.train.epochs
        if self.freeze >= epochs:
            return (
                f"method.freeze: the last layer would keep still in all {epochs} epochs: set less"
            )
        return None


class Config(TaughtSection):
    """DINO (Caron et al. 2021): a student predicts what its teacher says of another crop."""

    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"

    name: Literal["dino"] = "dino"
    prototypes: int = Field(65536, ge=2, description="width of the last layer")

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of the width of the last layer."""
        return math.log(self.prototypes)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops for the student, two for its teacher, the last layer and the centre."""
        return replace(super().cost(recipe, width), fixed=self.per_prototype * self.prototypes)
