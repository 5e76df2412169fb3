"""What a method declares as data, without torch: its crops, and how its rounds are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Refresh:
    """How a round of a method is made, and what the method keeps of the round before.

    source: `bank` takes rows that the method keeps of training; the first ones are extracted.
    unit: rows that are not whitened are scaled to length 1. kind: `sinkhorn` balances the answers
    of the method's own heads, with lambda = `sharpness`. first: `balanced` begins with random
    clusters of equal size, and reads no image for them.
    """

    levels: int = 1
    heads: int = 1
    source: Literal["extract", "bank"] = "extract"
    whiten: bool = True
    unit: bool = True
    spherical: bool = False
    kind: Literal["k-means", "sinkhorn"] = "k-means"
    first: Literal["features", "balanced"] = "features"
    sharpness: float = 25.0
    keeps_ids: bool = False
    resets: bool = False


@dataclass(frozen=True)
class Crops:
    """One kind of crop: how many of each image, and how they are drawn."""

    count: int
    size: int
    scale: tuple[float, float]
    turns: int = 1
    colour: bool = True
