"""What Daino declares, and the keys of its section: DINO's, with a prototype for each class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from deepclust.methods.dino.config import TaughtSection
from deepclust.methods.parts.class_prototypes import ClassPrototypes
from deepclust.recipe.declare import Cost

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(ClassPrototypes, TaughtSection):
    """Daino (Fini et al. 2023): DINO whose prototypes are the classes of a few labels."""

    name: Literal["daino"] = "daino"

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return DINO's, with prototypes for classes and free ones."""
        one = self.per_prototype
        return replace(super().cost(recipe, width), fixed=one * self.free, per_class=one)
