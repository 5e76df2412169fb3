"""The bank: a unit row of every sample, kept from the last time that the sample was trained on.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, appendix on DeepCluster-v2. The reference implementation is `main_deepclusterv2.py` of
facebookresearch/swav. Rounds cluster these rows, so no pass over the images is needed after the
first round. A sample has `parts` rows, one for each of its full-size crops.

There each rank keeps the rows that it happened to see, so a resume needs as many ranks as before.
Here a rank owns a range of sample ids (`world.Owned`). In a step all ranks gather the ids and rows
of the global batch, and each keeps its own. So the bank does not depend on who computed what. Its
slices are saved like those of a sharded head, and any number of ranks goes on with it.

Rows are float16, because a round's features are: float32 would be rounded on the way into
`features/rows.npy`, and k-means would get the same bits.

Let n be the samples, W the ranks, G the batch, P the parts and d the width of a row. A rank's slice
takes 2 n P d / W bytes. A step gathers G (8 + 2 P d). On disk features/ and each checkpoint have
2 n P d. With P = 2
and d = 128: 1.28M samples are 0.66 GB in all, 100M are 51 GB, on 64 ranks 0.8 GB each. A batch of
4096 is 2.1 MB.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor, nn

from deepclust.world import Owned, World

BLOCK = 2**16  # rows that are read, written or looked at together


class Bank(nn.Module):
    """rows [own, parts, d] of this rank's sample ids, zeros where a sample has none.

    `note` is called with every part of a batch and `flush` once a step, on all ranks. `filled` says
    whether a first pass over all images was taken in.
    """

    rows: Tensor
    filled: Tensor

    def __init__(self, samples: int, parts: int, dim: int, world: World) -> None:
        super().__init__()
        self.world = world
        self.range = Owned.of(samples, world, dim=0)
        rows = torch.zeros(self.range.count, parts, dim, dtype=torch.float16)
        self.register_buffer("rows", rows)
        self.register_buffer("filled", torch.tensor(False))
        self._noted: list[tuple[Tensor, Tensor]] = []  # of the step that is computed

    def owned(self) -> dict[str, Owned]:
        """Return what this rank holds of the rows."""
        return {"rows": self.range}

    @property
    def is_filled(self) -> bool:
        """Whether every usable sample has a row: those of a first pass, or later ones."""
        return bool(self.filled)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def note(self, sample_ids: Int64[Tensor, " b"], rows: Float[Tensor, "parts b d"]) -> None:
        """Keep the rows of a part of this rank's batch until `flush`."""
        kept = rows.detach().transpose(0, 1).to(self.rows)
        self._noted.append((sample_ids.to(self.rows.device, non_blocking=True), kept))

    @torch.no_grad()
    def flush(self) -> None:
        """Write the noted rows of all ranks, of a sample that was drawn twice the later one.

        Later is by the place in the plan, which does not depend on ranks or parts. Nothing here
        waits for a GPU.
        """
        ids, rows = (torch.cat(tensors) for tensors in zip(*self._noted, strict=True))
        self._noted.clear()
        # one rank's share after the other is the order of the plan
        ids, rows = self.world.all_gather(ids).flatten(), self.world.all_gather(rows).flatten(0, 1)
        if self.range.count > 0:
            slots, values = self._writes(ids, rows)
            self.rows[slots] = values

    def _writes(
        self, ids: Int64[Tensor, " G"], rows: Float16[Tensor, "G parts d"]
    ) -> tuple[Int64[Tensor, " G"], Float16[Tensor, "G parts d"]]:
        """Return G places in the slice and their rows, so that equal places have equal rows.

        Selecting this rank's ids would wait for the GPU. So the others repeat one of those writes,
        or write what is there.
        """
        order = torch.argsort(ids, stable=True)
        ids, rows = ids[order], rows[order]
        is_last = torch.cat([ids[1:] != ids[:-1], torch.ones_like(ids[:1], dtype=torch.bool)])
        mine = is_last & (ids >= self.range.start) & (ids < self.range.stop)
        one = mine.int().argmax()[None]
        place = torch.where(mine.any(), ids[one] - self.range.start, 0)
        value = torch.where(mine.any(), rows[one], self.rows[:1])
        slots = torch.where(mine, ids - self.range.start, place)
        return slots, torch.where(mine[:, None, None], rows, value)

    @torch.no_grad()
    def fill(self, rows: Float16[np.ndarray, "n d"]) -> None:
        """Take the features of a first pass: all parts of a sample get its row."""
        for start in range(self.range.start, self.range.stop, BLOCK):
            stop = min(start + BLOCK, self.range.stop)
            block = torch.from_numpy(np.array(rows[start:stop]))
            at = slice(start - self.range.start, stop - self.range.start)
            self.rows[at] = block[:, None].to(self.rows)
        self.filled.fill_(True)


def find_bank(method: nn.Module) -> Bank | None:
    """Return the bank of a method, or None where it keeps none."""
    return next((module for module in method.modules() if isinstance(module, Bank)), None)
