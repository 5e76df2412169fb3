"""What DAC declares, and the keys of its section: above all the two thresholds over the epochs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from deepclust.recipe.sections import MethodSection

if TYPE_CHECKING:
    from deepclust.recipe import Recipe

RISE = 0.1  # of the lower threshold, where the upper one falls by 1 (section 3.3 of the paper)


class Config(MethodSection):
    """DAC (Chang et al. 2017): pairs of images that are surely of one cluster or of two."""

    whole_batch: ClassVar[bool] = True
    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"

    name: Literal["dac"] = "dac"
    clusters: int = Field(ge=2, description="clusters, which are the network's outputs")
    upper: float = Field(
        0.95, gt=0, le=1, description="at first, more similar pairs are of one cluster"
    )
    lower: float = Field(
        0.455, ge=0, lt=1, description="at first, less similar pairs are of two clusters"
    )
    eta: float = Field(
        0.009, gt=0, description="speed at which the thresholds approach; 0.009 is 46 epochs"
    )

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"lower={self.lower} must be less than upper={self.upper}")
        return self

    def thresholds(self, epoch: int) -> tuple[float, float]:
        """Return the upper and the lower threshold of an epoch, counted from 0.

        u = upper - lambda and l = lower + 0.1 lambda. Every epoch lambda grows by eta times the
        slope of u - l, which is 1.1, so that lambda = 1.1 eta epoch.
        """
        moved = (1 + RISE) * self.eta * epoch
        return self.upper - moved, self.lower + RISE * moved

    @property
    def most_epochs(self) -> int:
        """The epochs after which the thresholds have met: the paper's algorithm 1 then stops."""
        return math.floor((self.upper - self.lower) / (self._closing * self.eta)) + 1

    @property
    def _closing(self) -> float:
        """How much nearer the thresholds come in an epoch, for eta = 1."""
        return (1 + RISE) ** 2

    def chance_loss(self, recipe: Recipe) -> float:
        """Return the cross-entropy of a pair whose similarity, one half, tells nothing."""
        return math.log(2)

    def misfit(self, recipe: Recipe) -> str | None:
        """Return that there are more epochs than the thresholds have."""
        epochs = recipe.train.epochs
        if epochs <= self.most_epochs:
            return None
        slower = (self.upper - self.lower) / (self._closing * (epochs - 0.5))
        return (
            f"train.epochs: the thresholds of dac meet after {self.most_epochs} epochs, and then "
            f"it ends: set train.epochs={self.most_epochs}, or method.eta={slower:.5g} so that "
            f"they meet after {epochs}"
        )
