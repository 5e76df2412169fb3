"""Colour images to two edge channels, fixed: how DeepCluster takes the easy cue of colour away."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

HORIZONTAL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
VERTICAL = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))


class Sobel(nn.Module):
    """Grey (the plain mean of RGB), then the two 3x3 Sobel filters, borders padded with zeros.

    It stands inside the model, after the images were normalised, as in DeepCluster's
    `models/alexnet.py`. The filter is a constant, so it is a buffer that no state dict carries.
    """

    channels = 2
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        filters = torch.tensor([HORIZONTAL, VERTICAL])[:, None]
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2 h w"]:
        """Edges of the grey image: channel 0 across columns, channel 1 across rows."""
        with torch.autocast(images.device.type, enabled=False):  # bf16 would blur faint edges
            grey = images.to(self.filters.dtype).mean(1, keepdim=True)
            return functional.conv2d(grey, self.filters, padding=1)
