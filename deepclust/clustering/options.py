"""What k-means is asked for, what it is given, and what it reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from deepclust.clustering.points import Rows


@dataclass(frozen=True)
class KMeansOptions:
    """The plain settings of a clustering.

    `kmeans` says what they mean.

    The recipe, the command `deepclust cluster FILE` and both levels of a two-level clustering hand
    them on in this form.
    """

    k: int
    iterations: int = 20
    seed: int = 0
    init: str = "random"
    empty: str = "split"
    spherical: bool = False
    min_size: int = 1
    tol: float = 0.0
    backend: str = "auto"


@dataclass(frozen=True)
class Given:
    """Centroids and assignments that a clustering takes over instead of drawing them.

    `centroids` [k, d] are the start. `fixed` [m, d] are clusters 0..m-1 and never change.
    `assignments` [n] (-1: none) are old ones, whose means on the new rows are the start.
    """

    centroids: Rows | None = None
    fixed: Rows | None = None
    assignments: Rows | None = None


NOTHING_GIVEN = Given()


@dataclass(frozen=True)
class Progress:
    """One finished pass of k-means, or one finished super-cluster of its second level."""

    pass_: int  # from 1
    of: int  # at most: passes end early when nothing moves
    inertia: float
    moved: int  # points whose cluster changed
    seconds: float  # since the start
    level: int = 1

    @property
    def eta(self) -> float:
        """Seconds that the remaining passes take at the speed of those so far."""
        return self.seconds / self.pass_ * (self.of - self.pass_)


OnProgress: TypeAlias = Callable[[Progress], None]
