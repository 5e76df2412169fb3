"""The trackers by the names that `track` of a recipe has, each a file with a class `TRACKER`.

One is opened with the run, its parameters and what it has noted of the run before. Then it is given
points of curves, pictures, and at the end the state of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL.Image import Image

from deepclust.run.directory import Run
from deepclust.run.varying import Point

TRACKERS = {
    "tensorboard": "deepclust.launch.trackers.board",
    "mlflow": "deepclust.launch.trackers.mlflow_store",
    "wandb": "deepclust.launch.trackers.wandb_offline",
}


@dataclass(frozen=True)
class Tracked:
    """What a tracker is opened with. `notes` are kept for the run's next attempt."""

    run: Run
    name: str
    parameters: Mapping[str, Any]  # the recipe's, by dotted keys, as people may see them
    notes: dict[str, Any]


class Tracker(Protocol):
    """What every tracker can do; whatever it raises ends it alone."""

    def __init__(self, tracked: Tracked) -> None:
        """Begin the tracker's run, or go on with the one that `tracked.notes` names."""

    def curves(self, points: Mapping[str, list[Point]]) -> None:
        """Send points, by the name of their curve."""

    def picture(self, name: str, step: int, image: Image) -> None:
        """Send a picture."""

    def close(self, state: str) -> None:
        """Send what is left; `state` is `finished`, `stopped` or `failed`."""
