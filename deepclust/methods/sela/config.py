"""What Self-Labelling declares, and the keys of its section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Crops, Refresh
from deepclust.recipe.sections import Data, MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(MethodSection):
    """SeLa, self-labelling (Asano et al. 2020).

    Its schedule is cluster.every="n rounds".
    """

    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"

    name: Literal["sela"] = "sela"
    heads: int = Field(10, ge=1, description="classifiers, each with its own labels")
    sharpness: float = Field(
        25.0, gt=0, description="lambda: higher gives labels nearer to the heads' answers"
    )
    crops_of_each: int = Field(1, ge=1, le=8, description="crops of an image in a batch")
    sampling: Literal["all", "exact", "paper"] = Field(
        "all", description="all: every image once an epoch; else uniform cluster sampling"
    )

    @property
    def round(self) -> Refresh:
        """Balanced labels from the heads' answers; random ones at first."""
        return Refresh(
            heads=self.heads,
            whiten=False,
            unit=False,
            kind="sinkhorn",
            first="balanced",
            sharpness=self.sharpness,
        )

    @property
    def mode(self) -> str:
        """The draw that the recipe chooses."""
        return self.sampling

    def crops(self, data: Data) -> tuple[Crops, ...]:
        """Return the full-size crops of every image."""
        return (Crops(self.crops_of_each, data.size, data.crop_scale),)

    def chance_loss(self, recipe: Recipe) -> float:
        """Return ln k."""
        return math.log(recipe.clustering.k)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops, and a linear classifier for each head: float32, with its bias."""
        passes = super().cost(recipe, width).passes
        return Cost(passes, per_cluster=4 * (width + 1) * self.heads)

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the clustering, if anything."""
        if recipe.clustering.k < 2:
            return "sela needs cluster.k of 2 or more"
        return None
