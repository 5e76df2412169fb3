"""What DeeperCluster declares, and the keys of its section."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Crops, Refresh
from deepclust.recipe.sections import ClusteringMethodSection, Data

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(ClusteringMethodSection):
    """DeeperCluster (Caron et al. 2019).

    Its levels are cluster.supers and cluster.k.
    """

    name: Literal["deepercluster"] = "deepercluster"
    rotations: Literal[1, 4] = Field(4, description="4: images turned by quarters; 1: upright")

    @property
    def round(self) -> Refresh:
        """Two levels of k-means.

        Both classifiers are renewed.
        """
        return Refresh(levels=2, resets=True)

    def crops(self, data: Data) -> tuple[Crops, ...]:
        """Return one crop, turned."""
        return (Crops(1, data.size, data.crop_scale, turns=self.rotations),)

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the logarithm of the number of clusters and turns."""
        return math.log(recipe.clustering.k * self.rotations)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return two linear classifiers: of super-classes, and of their sub-clusters, sharded."""
        row = 4 * (width + 1) * self.rotations
        usual = super().cost(recipe, width)
        return replace(usual, per_cluster=row, fixed=row * recipe.clustering.supers, sharded=True)

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the clustering, if anything."""
        if (recipe.clustering.init, recipe.clustering.min_size) == ("random", 1):
            return None
        return "deepercluster starts both levels at random: leave cluster.init and min_size out"
