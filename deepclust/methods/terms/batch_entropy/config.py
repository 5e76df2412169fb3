"""What the entropy of the mean prediction declares: a prior over classes, and a queue."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Entropy of a batch's mean prediction, made large: all classes are used."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"

    prior: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        min_length=2,
        description="expected share of each class, in their order, of any sum; null: equal ones",
    )
    queue: int = Field(
        0, ge=0, description="past batches whose means count too; for batches of few samples"
    )
