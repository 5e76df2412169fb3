"""What a rank does with a batch whose JPEGs its GPU decodes: crops, and substitutes for what fails.

An image that neither the GPU nor the CPU decodes is known as bad only here. Its row has the same
substitute as it would have if the worker had known: the first candidate that can be decoded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from deepclust.data.images import gpu_decode
from deepclust.data.read.dataset import Bad, Batches, Loaded, no_substitute


class Finisher:
    """Makes of what workers have sent the batches that a rank uses."""

    def __init__(self, batches: Batches, device: torch.device | None) -> None:
        """Raises `ResourceError` for a device that cannot decode."""
        self.batches, self.device = batches, gpu_decode.check(device)

    def finished(self, loaded: Loaded) -> Loaded:
        """Return the batch with its crops on the device."""
        loaded, failed = self._decoded(loaded)
        for row, reason in failed:
            loaded = self._replaced(loaded, row, reason)
        return replace(loaded, asked=None)

    def _decoded(self, loaded: Loaded) -> tuple[Loaded, list[tuple[int, str]]]:
        assert loaded.encoded is not None
        made, failed = gpu_decode.decoded_crops(loaded.images, loaded.encoded, self.device)
        return replace(loaded, images=tuple(made), encoded=None), failed

    def _replaced(self, loaded: Loaded, row: int, reason: str) -> Loaded:
        """Report a row's sample, and put another one into its place if the request allows it.

        One that is a substitute itself was reported by the worker.
        """
        asked = loaded.asked
        assert asked is not None
        sample_id, bad = int(asked.sample_ids[row]), loaded.bad
        reason = self.batches.placed(int(loaded.sample_ids[row]), reason)
        if row < asked.own and loaded.sample_ids[row] == sample_id:
            bad = [*bad, Bad(sample_id, reason)]
        if not asked.substitutes:
            return replace(loaded, bad=bad)
        candidates = self.batches.candidates(asked, row)
        for candidate in candidates:
            one = replace(asked.alone(row, candidate), assignments=None, replace=False)
            other, failed = self._decoded(self.batches[one])
            if not other.bad and not failed:
                return _with_row(replace(loaded, bad=bad), row, other)
        raise no_substitute(reason, len(candidates))


def _with_row(loaded: Loaded, row: int, other: Loaded) -> Loaded:
    """Return the batch with the one row of another batch in a row's place."""
    for crops, crop in zip(loaded.images, other.images, strict=True):
        crops[row].copy_(crop[0])
    sample_ids = np.array(loaded.sample_ids)
    sample_ids[row] = other.sample_ids[0]
    return replace(loaded, sample_ids=sample_ids)
