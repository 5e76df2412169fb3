"""Colours of crops: jitter, grey, blur and solarisation of whole uint8 batches, on any device.

SimCLR (Chen et al., 2020, appendix A) changes the colours of a crop by `ColorJitter`, grey and a
Gaussian blur, each with a probability. BYOL (Grill et al., 2020, appendix B) adds solarisation.
The meaning of each is that of torchvision.transforms.v2.functional. Between them colours are floats
in [0, 255], rounded once at the end. All randomness comes from `draws.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from deepclust.data.images.draws import uniform
from deepclust.data.to_device import constant, send
from deepclust.errors import RecipeError

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])  # the factors that change nothing
_ORDER, _FACTORS = slice(0, 4), slice(4, 8)  # columns of the draws, as are these:
_GREY, _SIGMA, _SOLARISE = 8, 9, 10
_BRIGHT = 127.5  # what is rounded to 128 and more is inverted by solarisation
_LUMA = (0.2989, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601), as torchvision rounds them
# Bytes of floats worked on at a time, and at least 8 images. On a CPU they stay in its cache (1.4
# to 1.9 times as fast as all at once), on a GPU they leave its memory to the network.
_IN_CACHE, _IN_MEMORY = 3 * 2**19, 2**28
_ROWS = 8


@dataclass(frozen=True)
class Colour:
    """The strengths and probabilities of changes of colour.

    `jitter` has the strengths of brightness, contrast, saturation and hue. A factor is uniform in
    [1 - strength, 1 + strength], at least 0. The hue is turned by up to that part of the circle
    either way. `blur_sigma` is (least, most) in pixels. All others are probabilities.
    """

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in (self.jitter_p, self.grey, self.blur, self.solarise)):
            raise RecipeError(f"jitter_p, grey, blur, solarise are probabilities; got {self}")
        if min(self.jitter) < 0 or self.jitter[_HUE] > 0.5:
            raise RecipeError(f"jitter is 4 numbers from 0, the last at most 0.5; got {self}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise RecipeError(f"blur_sigma is positive (least, most); got {self}")

    @property
    def does_nothing(self) -> bool:
        """Whether every image stays as it is."""
        return max(self.jitter) * self.jitter_p == 0 == self.grey == self.blur == self.solarise

    def draws(self, key: int, positions: Int64[np.ndarray, " b"]) -> Float64[np.ndarray, "b m"]:
        """Return what each position's colours are made of, a pure function of (key, position).

        A row holds the four jitters in their order and the four factors, which are neutral where it
        is not jittered. Then come 1 if it turns grey, the sigma of its blur (0: none), and 1 if it
        is solarised.
        """
        u = uniform(key, positions, 13)
        strength = np.array(self.jitter)
        low = np.where(np.arange(4) == _HUE, -strength, np.maximum(0, 1 - strength))
        factors = low + u[:, 4:8] * (_NEUTRAL + strength - low)
        factors = np.where(u[:, 8:9] < self.jitter_p, factors, _NEUTRAL)
        least, most = self.blur_sigma
        sigma = np.where(u[:, 10:11] < self.blur, least + u[:, 11:12] * (most - least), 0)
        order, grey, solarised = (
            np.argsort(u[:, :4], axis=1),
            u[:, 9:10] < self.grey,
            u[:, 12:] < self.solarise,
        )
        return np.hstack([order, factors, grey, sigma, solarised])

    def __call__(
        self, images: UInt8[Tensor, "b 3 s s"], draws: Float64[np.ndarray, "b m"]
    ) -> UInt8[Tensor, "b 3 s s"]:
        """Return the images in their new colours, on their device, row by row."""
        changed, image = torch.empty_like(images), 4 * 3 * images.shape[2] * images.shape[3]
        rows = max(_ROWS, (_IN_CACHE if images.device.type == "cpu" else _IN_MEMORY) // image)
        for at in range(0, len(images), rows):
            part = slice(at, at + rows)
            numbers = iter(send(list(self._numbers(draws[part])), images.device))
            changed[part] = self._changed(images[part].float(), numbers).add_(0.5)
        return changed

    def _numbers(self, draws: Float64[np.ndarray, "b m"]) -> Iterator[np.ndarray]:
        """Yield what `_changed` works with, in its order, so that all is sent at once."""
        for stage in range(self._stages):
            mine = draws[:, _ORDER][:, stage, None] == np.arange(4)
            factors = np.where(mine, draws[:, _FACTORS], _NEUTRAL)
            share = 1 - factors[:, :_HUE]
            yield from map(
                _column, (share[:, _CONTRAST], share[:, _SATURATION], 1 - share.sum(axis=1))
            )
            yield from _chosen(factors[:, _HUE])
        for column in (_GREY, _SIGMA, _SOLARISE):
            yield from _chosen(draws[:, column])

    @property
    def _stages(self) -> int:
        return 4 if max(self.jitter) > 0 else 0

    def _changed(
        self, x: Float32[Tensor, "b 3 s s"], numbers: Iterator[Tensor]
    ) -> Float32[Tensor, "b 3 s s"]:
        """Jitter, grey, blur and solarise in place, in this order, each where the draws say so.

        Jitter has four stages. In each of them every row gets the jitter that is next in its order.
        """
        for _ in range(self._stages):
            _towards(x, next(numbers), next(numbers), next(numbers))
            _change(x, numbers, turn_hue)
        _change(x, numbers, lambda rows, _: _grey(rows).expand(-1, 3, -1, -1))
        _change(x, numbers, blur_images)
        _change(x, numbers, lambda rows, _: rows.where(rows < _BRIGHT, 255 - rows))
        return x


def _towards(
    x: Float32[Tensor, "b 3 s s"],
    contrast: Float32[Tensor, "b 1 1 1"],
    saturation: Float32[Tensor, "b 1 1 1"],
    kept: Float32[Tensor, "b 1 1 1"],
) -> None:
    """Move to x + share (base - x) in [0, 255], in place.

    The base is black for brightness, the mean grey for contrast and the greys for saturation. One
    pass serves all three, because a row has at most one share that is not 0. A row without a share
    keeps its bits. Given are the shares of the last two, and what is left of x.
    """
    grey = _grey(x)
    mean = grey.mean((2, 3), keepdim=True).mul_(contrast)
    base = grey.mul_(saturation).add_(mean)
    x.mul_(kept).add_(base).clamp_(0, 255)


def _change(
    x: Float32[Tensor, "b 3 s s"],
    numbers: Iterator[Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Replace the next rows by `change(rows, values)`, if there are any."""
    at, values = next(numbers), next(numbers)
    if len(at):
        x.index_copy_(0, at, change(x.index_select(0, at), values))


def turn_hue(
    x: Float32[Tensor, "b 3 s s"], turns: Float32[Tensor, "b 1 1 1"]
) -> Float32[Tensor, "b 3 s s"]:
    """Turn the hue by parts of the circle, and keep value and saturation (of HSV).

    With colours stretched to [0, 1], the hue in sixths of a circle is +-(1 - r + g + b), signed as
    g - b. A channel is full within one sixth of its hue, and empty from two sixths on.
    """
    red, green, blue = x.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-6)).add_(1)
    hue = hue.copysign_(green - blue).div_(6)[:, None] + turns
    away = hue - constant([0, 1 / 3, 2 / 3], x.device)[:, None, None]
    away = away.sub_(away.round()).abs_()
    return away.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def blur_images(
    x: Float32[Tensor, "b 3 s s"], sigma: Float32[Tensor, "b 1 1 1"]
) -> Float32[Tensor, "b 3 s s"]:
    """Blur each image by a Gaussian of its sigma (pixels), with reflected edges.

    The kernel's side is odd and about a tenth of the image's, as in SimCLR (23 of 224 pixels).
    """
    b, channels, side, _ = x.shape
    radius = min(max(1, side // 20), side - 1)
    steps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (steps / sigma) ** 2, dim=3).expand(-1, channels, -1, -1)
    kernel = kernel.reshape(b * channels, 1, 1, -1)
    planes = functional.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    planes = functional.conv2d(planes, kernel, groups=b * channels)
    planes = functional.conv2d(planes, kernel.transpose(2, 3), groups=b * channels)
    return planes.view_as(x)


def _grey(x: Float32[Tensor, "b 3 s s"]) -> Float32[Tensor, "b 1 s s"]:
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _chosen(
    numbers: Float64[np.ndarray, " b"],
) -> tuple[Int64[np.ndarray, " m"], Float32[np.ndarray, "m 1 1 1"]]:
    """Return the rows whose number is not 0, and these numbers."""
    rows = np.flatnonzero(numbers)
    return rows, _column(numbers[rows])


def _column(numbers: Float64[np.ndarray, " b"]) -> Float32[np.ndarray, "b 1 1 1"]:
    """Return one number for each image."""
    return numbers.astype(np.float32)[:, None, None, None]
