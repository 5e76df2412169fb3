"""The `ray` section of a recipe: what a run asks of a Ray cluster."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepclust.errors import RecipeError, hide_values
from deepclust.recipe import Recipe, checked
from deepclust.recipe.sections import Section


class RankRange(Section):
    """The fewest ranks that an attempt may begin with, and the most that it uses."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class RaySpec(Section):
    """A run on Ray: which cluster, what a rank gets, and how many faults are tolerated."""

    address: str | None = Field(
        None,
        description="address of a running cluster, http://HOST:8265 or HOST:6379; default: "
        "a Ray that is started here",
    )
    python: str | None = Field(None, description="Python on the cluster; default: that of submit")
    env: dict[str, str] = Field({}, description="environment of the controller and of every rank")
    ranks: RankRange | None = Field(
        None, description="{min: 2, max: 8}: fewer ranks when nodes are lost, more when they return"
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="CPUs of a rank, its reader processes included; default: data.workers + 1",
    )
    worker_cpus: int = Field(1, ge=1, description="CPUs of the cluster worker, and its threads")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    wait: float = Field(900.0, ge=0, description="seconds to wait for a cluster that is too small")
    settle: float = Field(
        15.0, ge=0, description="seconds before the run begins with fewer ranks than `max`"
    )
    start: float = Field(300.0, gt=0, description="seconds for all processes to come up")
    hang: float | None = Field(
        None,
        gt=0,
        description="seconds without a sign of life that are a hang; default: train.hang",
    )
    stop: float = Field(
        120.0,
        gt=0,
        description="seconds for all ranks to stop at a step; after them they are killed",
    )
    worker_resources: dict[str, float] = Field(
        {},
        description="resources of the cluster worker's node, as given to `ray start --resources`",
    )
    max_failures: int = Field(10, ge=0, description="deaths and hangs before the run gives up")
    max_preemptions: int = Field(100, ge=0, description="nodes taken away before it gives up")

    def cpus_of(self, recipe: Recipe) -> int:
        """Return the CPUs of a rank: as given, or one and those of its readers."""
        return self.cpus or recipe.data.readers() + 1


def ray_spec(recipe: Recipe) -> RaySpec:
    """Return the `ray` section, checked.

    A `RecipeError` names every key that is wrong.
    """
    spec = checked(RaySpec, recipe.ray, "recipe", within="ray.")
    hide_values(spec.env)
    if spec.ranks is not None and not sizes(recipe, spec):
        raise RecipeError(
            f"ray.ranks: no number from {spec.ranks.min} to {spec.ranks.max} divides train.batch="
            f"{recipe.train.batch}"
        )
    return spec


def sizes(recipe: Recipe, spec: RaySpec) -> list[int]:
    """Return the possible numbers of ranks, most first, each a divisor of the batch."""
    if spec.ranks is None:
        return [recipe.train.ranks]
    wanted = range(spec.ranks.max, spec.ranks.min - 1, -1)
    parts = recipe.train.accumulate
    return [size for size in wanted if recipe.train.batch % (size * parts) == 0]
