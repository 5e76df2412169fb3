"""What the clustering module declares, and its keys."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """The clustering module of SuperCM."""

    uses_labels: ClassVar[bool] = True

    momentum: float | None = Field(
        None, ge=0, lt=1,
        description="share of a class mean's last value kept; null: the mean of all rows so far",
    )  # fmt: skip
    norm: bool = Field(
        False, description="features about zero and of equal spread, so that they cannot shrink"
    )
