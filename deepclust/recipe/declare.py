"""What a method declares as data, without torch: its crops, its rounds, and what a step costs."""

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


@dataclass(frozen=True)
class Pass:
    """Crops of one size that an image sends through a network in a step.

    `network` is the backbone's module in the method. A pass that is not `trained` has no backward.
    """

    network: str
    count: int
    size: int
    trained: bool = True


@dataclass(frozen=True)
class Cost:
    """What a step computes for each image, and what a method keeps beside its networks.

    State is in bytes, as it is saved: parameters and buffers, without gradients and optimizer
    state. `per_sample` is for each image of the data, `per_cluster` for each of `cluster.k`,
    `per_class` for each class of the seeds, and `fixed` the rest. Projections are networks. If
    `sharded`, ranks share what grows, else each has all of it.
    """

    passes: tuple[Pass, ...]
    per_sample: int = 0
    per_cluster: int = 0
    per_class: int = 0
    fixed: int = 0
    sharded: bool = False

    def __add__(self, other: Cost) -> Cost:
        """Return what both take together, sharded as the first is."""
        return Cost(
            self.passes + other.passes,
            self.per_sample + other.per_sample,
            self.per_cluster + other.per_cluster,
            self.per_class + other.per_class,
            self.fixed + other.fixed,
            self.sharded,
        )
