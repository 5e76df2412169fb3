"""What Pseudo-Label declares, and its key."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Cross-entropy of unlabelled samples to their own sure answers."""

    works_on: ClassVar[Literal["features", "logits"]] = "logits"

    threshold: float = Field(
        0.95, ge=0, lt=1, description="an answer with more probability becomes a target"
    )
