"""Weights & Biases: offline, into `wandb/` beside the run, unless WANDB_MODE says otherwise.

`wandb sync --append` sends a run that is offline. One that was resumed has a folder for each
attempt, of one id.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

import wandb
from PIL.Image import Image

from deepclust.launch.trackers import Tracked
from deepclust.run.varying import Point


class Offline:
    """A run of wandb."""

    def __init__(self, tracked: Tracked) -> None:
        folder = tracked.run.path.absolute().parent
        name = tracked.notes.setdefault("id", secrets.token_hex(4))
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "deepclust"), name=tracked.name, id=name,
            dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            resume="allow", config=dict(tracked.parameters), settings=quiet,
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def curves(self, points: Mapping[str, list[Point]]) -> None:
        """Send points, those of a step together."""
        steps: dict[int, dict[str, float]] = {}
        for name, some in points.items():
            for step, value in some:
                steps.setdefault(step, {})[name] = value
        for step in sorted(steps):
            self.run.log({**steps[step], "step": step})

    def picture(self, name: str, step: int, image: Image) -> None:
        """Send a picture."""
        self.run.log({name: wandb.Image(image), "step": step})

    def close(self, state: str) -> None:
        """Write what is left, and how the run has ended."""
        self.run.finish(exit_code=0 if state == "finished" else 1)


TRACKER = Offline
