"""The raw rows of a round that stay in memory until they are projected, as far as they fit.

They take the way over the disk otherwise. Rows are the same either way, bit for bit. A chunk whose
rows are in memory has its moments alone on disk. So rows are gone with their process, and a run
that is resumed extracts those chunks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from deepclust.clustering.kept_rows import free_memory
from deepclust.clustering.residence import MEMORY

Where = Literal["auto", "memory", "disk"]
SHARE_OF_GPU = 0.5  # of what is free beside the network: its batches need the rest
SHARE_OF_HOST = 0.5  # of what is free, by all ranks of a run together


@dataclass
class RawMemory:
    """Rows of this rank's chunks by number, on its device, within a limit in bytes."""

    where: Where
    device: torch.device
    ranks: int = 1
    rows: dict[int, Float[Tensor, "m D"]] = field(default_factory=dict)
    _left: int | None = None

    def takes(self, size: int) -> bool:
        """Return whether a chunk of so many bytes may stay; if so its room is taken."""
        if self._left is None:  # asked when the network is on the device already
            self._left = self._room()
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits

    def _room(self) -> int:
        if self.where == "disk":
            return 0
        if (free := MEMORY.get(self.device.type)) is not None:
            return int(SHARE_OF_GPU * free(self.device))
        if self.where == "auto":
            return 0  # a CPU's memory holds the file already, as long as there is room
        known = min(free_memory(), float(2**62))
        return int(SHARE_OF_HOST * known / self.ranks)
