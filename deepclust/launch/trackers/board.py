"""TensorBoard: hyperparameters, pictures, and the projector's rows.

The curves are in the same folder already: rank 0 writes them, whatever `track` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from deepclust.launch.trackers import Tracked
from deepclust.launch.trackers.pictures import sample
from deepclust.run.varying import Point

SHOWN = {"train/loss": 0.0, "round/nmi_labels": 0.0}  # beside the hyperparameters of each run


class Board:
    """A writer into the run's `tensorboard/`."""

    def __init__(self, tracked: Tracked) -> None:
        self.tracked = tracked
        self.writer = SummaryWriter(str(tracked.run.path / "tensorboard"))
        if tracked.notes.setdefault("parameters", False):
            return
        file: Any = self.writer.file_writer
        for summary in hparams(_plain(tracked.parameters), SHOWN):  # type: ignore[no-untyped-call]
            file.add_summary(summary)
        tracked.notes["parameters"] = True

    def curves(self, points: Mapping[str, list[Point]]) -> None:
        """Do nothing: rank 0 has written them."""

    def picture(self, name: str, step: int, image: Image) -> None:
        """Write a picture."""
        pixels = np.asarray(image)
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, state: str) -> None:
        """Write rows for the projector once the run is finished."""
        if state == "finished" and not self.tracked.notes.get("projector"):
            drawn = sample(self.tracked.run)
            if drawn is not None:
                rows, words, images = drawn
                pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
                self.writer.add_embedding(
                    torch.from_numpy(rows), words, pixels, tag="features",
                    metadata_header=["cluster", "label", "sample"],
                )  # fmt: skip
                self.tracked.notes["projector"] = True
        self.writer.close()


def _plain(parameters: Mapping[str, object]) -> dict[str, bool | str | float | int]:
    kinds = (bool, str, float, int)
    return {k: v if isinstance(v, kinds) else str(v) for k, v in parameters.items()}


TRACKER = Board
