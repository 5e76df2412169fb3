"""The crops of an extraction, kept by the rank that read them for the rounds to come.

Every round extracts the same centre crops. Where they are few and small, a rank keeps those of the
chunks that it has extracted, so later rounds read and decode nothing. A chunk that does not fit is
read again each time, and so is one with an image that could not be read. The pixels are the same
either way. A new process begins without any.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from deepclust.clustering.kept_rows import free_memory
from deepclust.copies import sent, to_host
from deepclust.data.read.dataset import Loaded
from deepclust.world import World

MOST = 2**30  # bytes of a rank
SHARE_OF_HOST = 0.1  # of what is free, by all ranks of a run together


def room(ranks: int) -> int:
    """Return the bytes that a rank may keep."""
    return min(MOST, int(SHARE_OF_HOST * min(free_memory(), 2.0**62) / ranks))


@dataclass
class KeptCrops:
    """Loaded batches of whole chunks by number, and `left` bytes of room for more."""

    left: int = 0
    pinned: bool = False  # in page-locked memory, so that no copy to a GPU is waited for
    chunks: dict[int, list[Loaded]] = field(default_factory=dict)
    _open: int | None = None  # the chunk whose batches come now
    _batches: list[Loaded] | None = None  # of it; None: it is not kept

    def held(self, world: World, count: int) -> Bool[Tensor, " count"]:
        """Return which of `count` chunks some rank keeps; all ranks ask together."""
        mine = torch.zeros(count, dtype=torch.int64)
        mine[list(self.chunks)] = 1
        if world.size > 1:
            (mine,) = to_host(world.all_reduce(sent(mine, world.device)))
        return mine > 0

    def offer(self, loaded: Loaded, samples: int) -> None:
        """Keep a copy of the next batch of a chunk of so many samples, if the chunk fits.

        Copies, because workers send batches in shared memory, which is scarce.
        """
        images = loaded.images[0]
        is_here = isinstance(images, Tensor) and images.device.type == "cpu"
        size = samples * images[0].nbytes if is_here else 0
        if loaded.tag != self._open:
            self._open, self._batches = loaded.tag, [] if 0 < size <= self.left else None
        if loaded.bad:
            self._batches = None
        if self._batches is None:
            return
        # what a loader has page-locked already is a copy
        copy = loaded.pin_memory() if self.pinned else loaded.each(torch.clone)
        self._batches.append(copy)
        if sum(len(one.sample_ids) for one in self._batches) == samples:
            self.chunks[loaded.tag] = self._batches
            self.left -= size
            self._open = self._batches = None
