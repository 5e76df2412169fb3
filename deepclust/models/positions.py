"""A vision transformer of torchvision that takes images of several sizes.

Its learned positions belong to the patches of one size. For another size they are interpolated, as
in DINO (Caron et al., ICCV 2021, facebookresearch/dino) and timm: bicubic, with antialiasing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.models import VisionTransformer


class ManySizes(VisionTransformer):  # type: ignore[misc]  # torchvision has no types
    """The same network, with the same parameters by the same names, for any number of patches."""

    def forward(self, images: Float[Tensor, "b c h w"]) -> Tensor:
        """Return what the heads give, for images whose sides are multiples of the patch."""
        if tuple(images.shape[-2:]) == (self.image_size, self.image_size):
            plain: Tensor = super().forward(images)
            return plain
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        torch._assert(
            (rows * self.patch_size, columns * self.patch_size) == tuple(images.shape[-2:]),
            f"{tuple(images.shape[-2:])} pixels are no multiple of {self.patch_size}",
        )
        encoder = self.encoder
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1)
        tokens = tokens + positions_of(encoder.pos_embedding, rows, columns)
        encoded = encoder.ln(encoder.layers(encoder.dropout(tokens)))
        logits: Tensor = self.heads(encoded[:, 0])
        return logits


def positions_of(
    learned: Float[Tensor, "1 n d"], rows: int, columns: int
) -> Float[Tensor, "1 m d"]:
    """Return positions of the class token and of rows x columns patches, from a square's."""
    side = round((learned.shape[1] - 1) ** 0.5)
    grid = learned[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(learned.dtype)
    return torch.cat([learned[:, :1], patches], 1)
