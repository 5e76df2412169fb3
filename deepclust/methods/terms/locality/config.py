"""What the locality of class activation maps declares: no keys beside weight and ramp."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Compact class activation maps; needs pooled maps and a linear classifier."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"
