"""What the entropy of the mean prediction declares: no keys beside weight and ramp."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Entropy of the mean prediction."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"
