"""Images to features as a method embeds them: one class for extraction and for evaluation.

Precision, memory layout and evaluation mode are decided here and nowhere else, so what is
evaluated is what was clustered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from deepclust.data.images.crops import to_float
from deepclust.methods.base import Method
from deepclust.recipe.sections import Data


@dataclass(frozen=True)
class Embedder:
    """The map from images to the features that a method trains."""

    method: Method
    data: Data
    precision: str  # of the recipe, train.precision
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 s s"]) -> Float32[Tensor, "b d"]:
        """Return the features of a batch, on the device, computed in evaluation mode."""
        return self._apply(self.method.embed, images)

    @torch.inference_mode()
    def clustered(self, images: UInt8[Tensor, "b 3 s s"]) -> Float32[Tensor, "b d"]:
        """Return the rows that a round is made of, computed likewise."""
        return self._apply(self.method.clustered, images)

    @torch.inference_mode()
    def answer(self, features: Float[np.ndarray, "b D"]) -> Float32[Tensor, "b k"]:
        """Return the method's logits of features that were embedded, in float32."""
        self.method.eval()
        rows = torch.from_numpy(np.asarray(features, np.float32)).to(self.device)
        return self.method.answer(rows).float()

    @torch.inference_mode()
    def answered(self, images: UInt8[Tensor, "b 3 s s"], *others: Method) -> Float32[Tensor, "b k"]:
        """Return the same logits of images: `answer` of what is embedded.

        Behind them are those of `others`, methods with the same trunk.
        """

        def work(floats: Tensor) -> Tensor:
            features = self.method.embed(floats)
            answers = [one.answer(features).float() for one in (self.method, *others)]
            return torch.cat(answers, 1)

        return self._apply(work, images)

    def _apply(self, work: Callable[[Tensor], Tensor], images: UInt8[Tensor, "b 3 s s"]) -> Tensor:
        self.method.eval()
        with autocast(self.precision, self.device):
            floats = to_float(
                images.to(self.device, non_blocking=True), self.data.mean, self.data.std
            )
            floats = floats.contiguous(memory_format=torch.channels_last)
            return work(floats).float()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of `train.precision`: by default bf16 where a GPU has it."""
    enabled = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@cache
def has_bf16(device: torch.device) -> bool:
    """Return whether this is a GPU with bf16 in hardware, which compute capability 8.0 brought.

    Older ones emulate it, slower than float32.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
