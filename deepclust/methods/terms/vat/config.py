"""What virtual adversarial training declares, and its keys."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Answers should not change in the direction in which they change most."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"

    eps: float = Field(
        6.0, gt=0,
        description="length of the change to an image, over all normalised pixels and channels",
    )  # fmt: skip
    xi: float = Field(
        1e-2, gt=0, description="length of the change by which the direction is looked for"
    )
    iterations: int = Field(1, ge=1, description="of the power method that looks for it")
