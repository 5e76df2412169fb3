"""What DeepCluster-v2 declares, and the keys of its section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Refresh
from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe

FULL = 2  # full-size crops, each of which has its own row in the bank


class Config(MethodSection):
    """DeepCluster-v2 (Caron et al. 2020)."""

    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"
    full_crops: ClassVar[int] = FULL
    local_crops: ClassVar[bool] = True

    name: Literal["deepcluster-v2"] = "deepcluster-v2"
    heads: int = Field(3, ge=1, description="clusterings of the samples, from different starts")
    temperature: float = Field(0.1, gt=0)
    hidden: int = Field(2048, ge=1, description="width of the projection head's hidden layers")
    out: int = Field(128, ge=1, description="dimensions of the projection")
    layers: int = Field(2, ge=1, le=4, description="linear layers of the projection head")
    sampling: Literal["all", "exact", "paper"] = Field(
        "all", description="all: every image once an epoch; else uniform cluster sampling"
    )

    @property
    def round(self) -> Refresh:
        """Spherical k-means of the projections that training has left in the bank."""
        return Refresh(heads=self.heads, source="bank", whiten=False, spherical=True)

    @property
    def mode(self) -> str:
        """The draw that the recipe chooses."""
        return self.sampling

    def chance_loss(self, recipe: Recipe) -> float:
        """Return ln k."""
        return math.log(recipe.clustering.k)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return all crops, the bank (fp16, sharded) with its mark, and the prototypes."""
        return Cost(
            super().cost(recipe, width).passes,
            per_sample=2 * FULL * self.out,
            per_cluster=4 * self.heads * self.out,
            fixed=1,
            sharded=True,
        )

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the clustering, if anything."""
        return None if recipe.clustering.k >= 2 else "deepcluster-v2 needs cluster.k of 2 or more"
