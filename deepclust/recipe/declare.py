"""What a method declares as data: its crops, and how its rounds are made. Nothing imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Refresh:
    """How a round is made: from which rows, by which solver, and what it does to the method."""

    levels: int = 1
    heads: int = 1
    source: Literal["extract", "bank"] = "extract"
    whiten: bool = True
    spherical: bool = False
    kind: Literal["k-means", "sinkhorn"] = "k-means"
    keeps_ids: bool = False
    resets: bool = False


@dataclass(frozen=True)
class Crops:
    """One kind of crops: how many of every image, their size in pixels and their share of it."""

    count: int
    size: int
    scale: tuple[float, float]
    turns: int = 1
    colour: bool = True
