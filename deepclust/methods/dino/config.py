"""What DINO declares, and the keys of its section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Pass
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """DINO (Caron et al. 2021): a student predicts what its teacher says of another crop."""

    trunk: ClassVar[str] = "teacher.backbone"
    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"
    full_crops: ClassVar[int] = 2
    local_crops: ClassVar[bool] = True

    name: Literal["dino"] = "dino"
    prototypes: int = Field(65536, ge=2, description="width of the last layer")
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

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of the width of the last layer."""
        return math.log(self.prototypes)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops for the student, two for its teacher, the last layer and the centre."""
        students = super().cost(recipe, width).passes
        taught = Pass("teacher.backbone", 2, recipe.data.size, trained=False)
        rows = self.bottleneck + (0 if self.unit_last else 1)
        return Cost((*students, taught), fixed=4 * self.prototypes * (rows + 1))

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the freezing, if anything."""
        epochs = recipe.train.epochs
        if self.freeze >= epochs:
            return (
                f"method.freeze: the last layer would keep still in all {epochs} epochs: set less"
            )
        return None
