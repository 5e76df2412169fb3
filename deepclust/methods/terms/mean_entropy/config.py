"""What the entropy of the mean prediction declares: no keys beside weight and ramp."""

from __future__ import annotations

from deepclust.recipe.sections import TermSection


class Config(TermSection):
    """Entropy of the mean prediction."""
