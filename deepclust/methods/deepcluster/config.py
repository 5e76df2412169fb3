"""What DeepCluster declares, and the keys of its section."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deepclust.recipe.declare import Cost, Refresh
from deepclust.recipe.sections import ClusteringMethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe


class Config(ClusteringMethodSection):
    """DeepCluster (Caron et al. 2018)."""

    name: Literal["deepcluster"] = "deepcluster"
    head: Literal["reset", "match", "centroids"] = Field(
        "reset", description="what a new round does to the classifier"
    )

    @property
    def round(self) -> Refresh:
        """What a new round changes, by `head`.

        `reset` makes a new classifier. `match` lets clusters keep their ids from round to round.
        """
        return Refresh(keeps_ids=self.head == "match", resets=self.head == "reset")

    def chance_loss(self, recipe: Recipe) -> float:
        """Return ln k."""
        return math.log(recipe.clustering.k)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return a linear classifier, or the round's whitening and centroids, float32."""
        usual, dim = super().cost(recipe, width), recipe.clustering.dim
        if self.head != "centroids":
            return usual
        return replace(usual, per_cluster=4 * dim, fixed=4 * width * (dim + 1))

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what is wrong with the clustering, if anything."""
        if recipe.clustering.k >= 2 and recipe.clustering.supers == 1:
            return None
        return "deepcluster needs cluster.k of 2 or more and cluster.supers=1 (or deepercluster)"
