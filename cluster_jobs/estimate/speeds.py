"""How fast a machine does each stage; with where the numbers come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Speeds:
    """Speeds of the whole worker group, and seconds of what does not grow with the images."""

    start: float  # seconds from the command to the first image
    trained: float  # images a second, through all crops
    extracted: float  # images a second
    pairs: float  # of k-means: rows times centroids a second
    round: float  # seconds of a round's whitening, statistics and files
    checkpoint: float  # seconds
    assumptions: list[str] = field(default_factory=list)
