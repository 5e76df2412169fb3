"""From the plan to what a method sees: this rank's reads, and their views on its device.

Views, turns and colours are drawn from (seed, segment, position in the plan), so they depend on
nothing else: not on ranks, workers, restarts, or on where the colours are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import Crop, RandomResizedCrop, to_float
from deepclust.data.images.rotate import quarters, rotate
from deepclust.data.plan import EpochPlan
from deepclust.data.read.loader import Loaded, Request
from deepclust.methods.base import Batch, Needs, Targets
from deepclust.recipe.sections import Data
from deepclust.run.checkpoint import State
from deepclust.world import World, derive


@dataclass(frozen=True)
class Feed:
    """A rank's side of the plan. `batch` is global, `parts` is how many a rank's share makes."""

    data: Data
    needs: Needs
    world: World
    seed: int
    batch: int
    parts: int

    def requests(self, plan: EpochPlan, targets: Targets | None, state: State) -> Iterator[Request]:
        """This rank's reads, from the step where we are: a slice of the plan."""
        data, world = self.data, self.world
        assignments = None if targets is None else targets.file
        sample_ids = plan.for_rank(world.rank, world.size, state.offset)
        share = sample_ids.shape[1]
        view = RandomResizedCrop(data.size, data.crop_scale, data.crop_ratio, data.flip)
        crop = Crop(view, None if self._on_device else self._colour)
        for row, step in enumerate(range(state.offset, plan.steps)):
            first = step * self.batch + world.rank * share
            places = np.split(np.arange(first, first + share), self.parts)
            for mine, where in zip(np.split(sample_ids[row], self.parts), places, strict=True):
                yield Request(
                    mine, where, self._key(state.segment), (crop,) * self.needs.views,
                    assignments, replace=True,
                )  # fmt: skip

    def to_batch(self, loaded: Loaded, targets: Targets | None, segment: int) -> Batch:
        """Colour (if that is done here), turn and normalise; look the targets up."""
        device, key = self.world.device, self._key(segment)
        drawn = quarters(derive(key, "turn"), loaded.positions, self.needs.rotations)
        turns = torch.from_numpy(drawn)  # stays on the CPU, or `rotate` would wait for a GPU
        crops = [images.to(device, non_blocking=True) for images in loaded.images]
        views = [self._view(part, v, loaded, turns, key) for v, part in enumerate(crops)]
        heads = np.zeros((0, len(loaded.sample_ids)), np.int32)
        found = heads if targets is None else targets.assignments[:, loaded.sample_ids]
        labels = torch.from_numpy(found.astype(np.int64)).to(device)
        ids = torch.from_numpy(np.asarray(loaded.sample_ids))
        return Batch(ids, tuple(views), turns.to(device), labels)

    def _view(
        self,
        images: UInt8[Tensor, "b 3 s s"],
        number: int,
        loaded: Loaded,
        turns: Int64[Tensor, " b"],
        key: int,
    ) -> Float[Tensor, "b 3 s s"]:
        if self._on_device and self._colour is not None:
            draws = self._colour.draws(derive(key, "colour", number), loaded.positions)
            images = self._colour(images, draws)
        if self.needs.rotations > 1:
            images = rotate(images, turns)
        floats = to_float(images, self.data.mean, self.data.std)
        return floats.contiguous(memory_format=torch.channels_last)

    def _key(self, segment: int) -> int:
        return derive(self.seed, "view", segment)

    @property
    def _colour(self) -> Colour | None:
        data = self.data
        colour = Colour(data.jitter, data.jitter_p, data.grey, data.blur, data.blur_sigma)
        return None if colour.does_nothing else colour

    @property
    def _on_device(self) -> bool:
        wanted = self.data.colour_on
        return wanted == "device" or (wanted == "auto" and self.world.device.type == "cuda")
