"""How fast a machine does each stage; with where the numbers come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster_jobs.estimate.counts import Counts
from cluster_jobs.estimate.growth import growth
from deepclust.recipe import Recipe


@dataclass(frozen=True)
class Speeds:
    """Speeds of the whole worker group, and seconds of what does not grow with the images."""

    start: float  # seconds from the command to the first image, and of the end
    trained: float  # images a second, through all crops
    extracted: float  # images a second, read from the shards
    row: float  # seconds of a row in a round: its projection, and k-means of all levels and heads
    segment: float = 0.0  # seconds before the first step of a plan
    again: float | None = None  # of later extractions, where ranks keep crops; None: as extracted
    extraction: float = 0.0  # seconds of an extraction beside its images
    round: float = 0.0  # seconds of a round's whitening, statistics and files
    checkpoint: float = 0.0  # seconds
    evaluated: float | None = None  # images a second of train.evaluate; None: as extracted
    memory: float | None = None  # bytes of all processes at their peak, where it was measured
    shown: int = 0  # samples of the run that was measured: what grows with them is in its figures
    assumptions: list[str] = field(default_factory=list)


def seconds(recipe: Recipe, counts: Counts, speeds: Speeds) -> dict[str, float]:
    """Return the seconds of each stage, without those that a recipe does not have."""
    images = counts.samples

    def grown(stage: str) -> float:
        return growth(stage, images, speeds.shown)

    trained = counts.steps * recipe.train.batch / speeds.trained
    taken = {
        "start": speeds.start,
        "extraction": counts.extractions * speeds.extraction
        + images / speeds.extracted
        + (counts.extractions - 1) * images / (speeds.again or speeds.extracted),
        "clustering": counts.rounds * (speeds.round + images * speeds.row + grown("statistics")),
        "training": counts.segments * (speeds.segment + grown("plan")) + trained,
        "checkpoints": counts.checkpoints * speeds.checkpoint,
    }
    if not counts.rounds:
        del taken["clustering"]
    if not counts.extractions:
        del taken["extraction"]
    if counts.evaluations:
        rate = speeds.evaluated or min(speeds.extracted, speeds.trained)
        taken["evaluation"] = counts.evaluations * counts.evaluated / rate
    return taken
