"""What the mean entropy of single predictions declares: no keys beside weight and ramp."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Mean entropy of single predictions, made small: every answer is a decided one."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"
