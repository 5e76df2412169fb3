"""Crops: what the network sees of an image, as uint8, with torchvision's semantics.

All randomness comes from `draws.py`: the same for any number of reader processes and ranks. Images
stay uint8 until `to_float`, which runs on the training device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from deepclust.data.images.colour import Colour
from deepclust.data.images.draws import uniform
from deepclust.data.to_device import constant
from deepclust.errors import RecipeError

_resize = torch.ops.aten._upsample_bilinear2d_aa.default
_LONGEST = 16  # times the shorter side: what a centre crop keeps of a longer image, see there


class View(Protocol):
    """A way to crop an image: random numbers for a batch of positions, then image by image."""

    @property
    def size(self) -> int:
        """The side of the square that comes out, pixels."""

    def draws(self, key: int, positions: Int64[np.ndarray, " b"]) -> Sequence[Any]:
        """Return what each position's crop is made of, a pure function of (key, position)."""

    def __call__(self, image: UInt8[Tensor, "3 h w"], draw: Any) -> UInt8[Tensor, "3 s s"]:
        """Return the crop of one image for one of the draws."""


@dataclass(frozen=True)
class Crop:
    """One crop of every image of a batch, and its colours (None: they stay).

    `labelled` is how those of labelled samples are drawn, if not like all others. It has the same
    size, and its colours differ in their chances alone.
    """

    view: View
    colour: Colour | None = None
    labelled: Crop | None = None

    def draws(
        self, key: int, positions: Int64[np.ndarray, " b"], known: Bool[np.ndarray, " b"] | None
    ) -> Sequence[Any]:
        """Return what each position's crop is made of, by whether its sample is labelled."""
        drawn = self.view.draws(key, positions)
        if self.labelled is None or known is None:
            return drawn
        other = self.labelled.view.draws(key, positions)
        return [b if is_known else a for a, b, is_known in zip(drawn, other, known, strict=True)]

    def coloured(
        self,
        images: UInt8[Tensor, "b 3 s s"],
        key: int,
        positions: Int64[np.ndarray, " b"],
        known: Bool[np.ndarray, " b"] | None,
    ) -> UInt8[Tensor, "b 3 s s"]:
        """Return the images with the colours that are drawn for their positions."""
        if self.colour is None:
            return images
        draws = self.colour.draws(key, positions)
        if self.labelled is not None and self.labelled.colour is not None and known is not None:
            draws = np.where(known[:, None], self.labelled.colour.draws(key, positions), draws)
        return self.colour(images, draws)


@dataclass(frozen=True)
class CentreCrop:
    """torchvision's `Resize(resize)` of the shorter side, then `CenterCrop(size)`, in pixels."""

    size: int
    resize: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise RecipeError(
                f"a centre crop of {self.size} px needs a shorter side of at least that; "
                f"got resize = {self.resize}"
            )

    def draws(self, key: int, positions: Int64[np.ndarray, " b"]) -> Sequence[None]:
        """Return no draw for every position."""
        return [None] * len(positions)

    def __call__(self, image: UInt8[Tensor, "3 h w"], draw: None = None) -> UInt8[Tensor, "3 s s"]:
        """Return the resized centre of the image."""
        short = min(image.shape[1:])
        # 1 x 60,000 pixels would become resize x (60,000 * resize): drop what can't be seen. The
        # only difference to torchvision, of less than a pixel, in images longer than 16:1.
        image = _centre(image, *(min(side, longest_kept(short)) for side in image.shape[1:]))
        if short != self.resize:
            sides = [int(self.resize * side / short) for side in image.shape[1:]]
            image = _resized(image, (0, 0, *image.shape[1:]), sides)
        return _centre(image, self.size, self.size)


@dataclass(frozen=True)
class RandomResizedCrop:
    """torchvision's `RandomResizedCrop(size, scale, ratio)`, then a flip with that probability.

    There are ten tries at a crop of a uniform share of the area and a log-uniform aspect ratio. If
    none fits, it is the largest centre crop whose ratio is allowed (Szegedy et al., 2015).
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    tries = 10

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.flip <= 1:
            raise RecipeError(f"size must be positive and flip in [0, 1]; got {self}")
        if not (0 < self.scale[0] <= self.scale[1] and 0 < self.ratio[0] <= self.ratio[1]):
            raise RecipeError(f"scale and ratio are positive (least, most); got {self}")

    def draws(self, key: int, positions: Int64[np.ndarray, " b"]) -> list[list[float]]:
        """Return what each position's crop is made of, a pure function of (key, position).

        A row holds 10 heights and 10 widths, relative to the square root of the area. Then come the
        crop's place in [0, 1) down and across, and 1 if it is flipped.
        """
        u = uniform(key, positions, 2 * self.tries + 3)
        tries = self.tries
        area = self.scale[0] + u[:, :tries] * (self.scale[1] - self.scale[0])
        low, high = np.log(self.ratio)
        ratio = np.exp(low + u[:, tries : 2 * tries] * (high - low))
        sides = np.concatenate([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1)
        flip = u[:, -1:] < self.flip
        rows: list[list[float]] = np.hstack([sides, u[:, -3:-1], flip]).tolist()
        return rows

    def box(self, height: int, width: int, draw: list[float]) -> tuple[int, int, int, int]:
        """Return the crop of a height x width image: top, left, height, width in pixels."""
        root = math.sqrt(height * width)
        for i in range(self.tries):
            h, w = round(root * draw[i]), round(root * draw[i + self.tries])
            if 0 < h <= height and 0 < w <= width:
                return int(draw[-3] * (height - h + 1)), int(draw[-2] * (width - w + 1)), h, w
        low, high = self.ratio
        h = max(1, min(height, round(width / low)))
        w = max(1, min(width, round(height * high)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image: UInt8[Tensor, "3 h w"], draw: list[float]) -> UInt8[Tensor, "3 s s"]:
        """Cut the crop of `draw` out, resize it to size x size, flip it if the draw says so."""
        box = self.box(image.shape[1], image.shape[2], draw)
        crop = _resized(image, box, [self.size, self.size])
        return crop.flip(-1) if draw[-1] else crop


def longest_kept(short: int) -> int:
    """Return how much a centre crop keeps of the longer side of an image."""
    return _LONGEST * short


def _resized(
    image: UInt8[Tensor, "3 h w"], box: tuple[int, int, int, int], sides: list[int]
) -> UInt8[Tensor, "3 s t"]:
    """Crop (top, left, height, width) and resize: antialiased bilinear on uint8, as torchvision."""
    # One strided view: after slices and `image[None]` the batch stride hides from the kernel that
    # decoded images are channels-last, and it converts them first (1.7 times as long in all).
    top, left, height, width = box
    plane, row, column = image.stride()
    crop = image.as_strided(
        (1, 3, height, width),
        (image.numel(), plane, row, column),
        image.storage_offset() + top * row + left * column,
    )
    batch: Tensor = _resize(crop, sides, False, None, None)
    return batch[0]


def _centre(image: UInt8[Tensor, "3 h w"], height: int, width: int) -> UInt8[Tensor, "3 s t"]:
    top = round((image.shape[1] - height) / 2)
    left = round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def to_float(
    images: UInt8[Tensor, "b 3 h w"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "b 3 h w"]:
    """Return (images / 255 - mean) / std per channel, on the images' device.

    `mean` and `std` are in [0, 1].
    """
    scale = constant([1 / (255 * s) for s in std], images.device)[:, None, None]
    shift = constant([-m / s for m, s in zip(mean, std, strict=True)], images.device)
    return images.to(torch.float32).mul_(scale).add_(shift[:, None, None])
