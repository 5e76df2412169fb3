"""Crops of whole images on a device, with the bits of the CPU's crops (`crops.py`).

The antialiased resize of uint8 images is integer arithmetic in aten: int16 weights of 2^p. It goes
along rows and then along columns, each time with a sum, a rounding shift and a clip. A device that
has integers has the same bits. The weights are made on the CPU in float64, as aten makes them
(aten/src/ATen/native/cpu/UpSampleKernel.cpp, `compute_index_ranges_int16_weights`).

`pack` lays what the crops take of a batch's images into one block of bytes, with a table.
`crop` makes the crops on the device of the block: by a Triton kernel on a GPU, else in torch. A
run does so with `data.crop_on=device`. Whether it saves a reader more than the larger batches cost
takes a GPU to measure (`tools/bench/device_crops.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int16, Int32, Int64, UInt8
from torch import Tensor

from deepclust.data.images.crops import CentreCrop, RandomResizedCrop, longest_kept
from deepclust.data.images.headers import Size
from deepclust.errors import ResourceError

MOST_BITS = 22  # of a weight's fraction, in aten


class Taps(NamedTuple):
    """How one axis is resized: every output pixel is a weighted sum of `weights.shape[1]` inputs.

    The sum is shifted right by `shift` bits, rounded half up. Weights beyond an axis are 0.
    """

    first: Int32[np.ndarray, " out"]
    weights: Int16[np.ndarray, "out taps"]
    shift: int


class Cut(NamedTuple):
    """A crop of an image: a box, resized to `sides`, of which a square from `corner` on is kept."""

    box: tuple[int, int, int, int]  # top, left, height, width
    sides: tuple[int, int]
    corner: tuple[int, int]
    flip: bool = False


class Jpeg(NamedTuple):
    """An image that is decoded on the device: its file, and the size that its header gives."""

    data: bytes
    size: Size

    @property
    def pixels(self) -> int:
        """The bytes of the decoded image."""
        return 3 * self.size.height * self.size.width


@dataclass(frozen=True)
class Packed:
    """The boxes of a batch of images and how they are resized; axis 0 is down, axis 1 across."""

    pixels: UInt8[Tensor, " bytes"]
    places: Int64[Tensor, "b 4"]  # offset of the box, strides of plane, row and column
    turns: Int32[Tensor, "b 2"]  # flipped (0 or 1), then quarter turns counter-clockwise
    first: Int32[Tensor, "b 2 s"]
    weights: Int16[Tensor, "b 2 s t"]
    shifts: Int32[Tensor, "b 2"]

    @property
    def parts(self) -> list[Tensor]:
        """Its tensors (arrays on their way through a pipe)."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(part.nbytes for part in self.parts)

    def each(self, change: Callable[[Any], Any]) -> Packed:
        """Return the same with every tensor changed."""
        return Packed(*map(change, self.parts))

    def part(self, rows: range, more: Sequence[UInt8[Tensor, " m"]]) -> Packed:
        """Return some of its crops, with more bytes after those that it has."""
        kept = self.each(lambda part: part[rows.start : rows.stop])
        return replace(kept, pixels=torch.cat([self.pixels, *more]) if more else self.pixels)

    def to(self, device: torch.device) -> Packed:
        """Return a copy on the device, which the host does not wait for where it is pinned."""
        return self.each(lambda part: part.to(device, non_blocking=True))


@dataclass
class Boxes:
    """A batch's images and their cuts, gathered row by row; a row without an image is black."""

    size: int
    images: list[UInt8[Tensor, "3 h w"] | Jpeg]
    cuts: list[Cut]

    @classmethod
    def black(cls, count: int, size: int) -> Boxes:
        """Return `count` rows without an image."""
        pixel = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return cls(size, [pixel] * count, [Cut((0, 0, 1, 1), (size, size), (0, 0))] * count)

    def put(self, row: int, image: UInt8[Tensor, "3 h w"] | Jpeg, view: Any, draw: Any) -> None:
        """Take a row's image, of which the view with this draw is wanted."""
        height, width = image.size if isinstance(image, Jpeg) else image.shape[1:]
        self.images[row], self.cuts[row] = image, cut_of(view, height, width, draw)

    def pack(self, starts: Mapping[int, int] | None = None) -> Packed:
        """Return what is to be sent to the device; `starts` as in `pack`."""
        return pack(self.images, self.cuts, self.size, starts=starts)


def each_tensor(images: Any, change: Callable[[Any], Any]) -> Any:
    """Return crops, or what they are made of, with every tensor changed."""
    return images.each(change) if isinstance(images, Packed) else change(images)


def on_device(images: Tensor | Packed, device: torch.device) -> UInt8[Tensor, "b 3 s s"]:
    """Return a batch's crops on the device, made there if they are not made yet."""
    if isinstance(images, Packed):
        return crop(images.to(device))
    return images.to(device, non_blocking=True)


@functools.lru_cache(maxsize=4096)
def taps(size: int, out: int) -> Taps:
    """Return the weights of a bilinear, antialiased resize of one axis."""
    scale = size / out
    support = max(scale, 1.0)
    most = math.ceil(support) * 2 + 1
    centres = scale * (np.arange(out) + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + support + 0.5).astype(np.int64), size) - first
    j = np.arange(most)
    inside = j < np.clip(counts, 0, most)[:, None]
    # the order of these operations is aten's: another one rounds otherwise
    apart = np.abs((j + first[:, None] - centres[:, None] + 0.5) * (1.0 / support))
    weights = np.where(inside & (apart < 1.0), 1.0 - apart, 0.0)
    totals = np.zeros(out)
    for column in weights.T:
        totals += column
    weights /= np.where(totals == 0, 1.0, totals)[:, None]
    shift = 0
    while shift < MOST_BITS and int(0.5 + weights.max() * 2 ** (shift + 1)) < 2**15:
        shift += 1
    return Taps(first.astype(np.int32), (0.5 + weights * 2**shift).astype(np.int16), shift)


def cut_of(view: Any, height: int, width: int, draw: Any) -> Cut:
    """Return how a view of `crops.py` cuts an image of this size."""
    if isinstance(view, RandomResizedCrop):
        box = view.box(height, width, draw)
        return Cut(box, (view.size, view.size), (0, 0), bool(draw[-1]))
    if not isinstance(view, CentreCrop):
        raise TypeError(f"{type(view).__name__} cannot be cut on a device")
    short = min(height, width)
    sides = [min(side, longest_kept(short)) for side in (height, width)]
    top, left = (round((old - new) / 2) for old, new in zip((height, width), sides, strict=True))
    resized = [side if short == view.resize else int(view.resize * side / short) for side in sides]
    down, across = (round((side - view.size) / 2) for side in resized)
    return Cut((top, left, sides[0], sides[1]), (resized[0], resized[1]), (down, across))


def pack(
    images: Sequence[UInt8[Tensor, "3 h w"] | Jpeg],
    cuts: Sequence[Cut],
    size: int,
    quarters: Sequence[int] | None = None,
    starts: Mapping[int, int] | None = None,
) -> Packed:
    """Return what the cuts take of the images as one block; every crop is size x size.

    Whole images that are decoded later are to follow that block, plane by plane. `starts` says
    where among them each row's image begins.
    """
    boxes = [_boxed(image, cut.box) for image, cut in zip(images, cuts, strict=True)]
    ends = np.cumsum([box.numel() for box in boxes]).tolist()
    pixels = torch.empty(ends[-1], dtype=torch.uint8)
    places, axes = [], []
    for row, (box, cut, end) in enumerate(zip(boxes, cuts, ends, strict=True)):
        pixels[end - box.numel() : end].view(box.shape).copy_(box)
        image = images[row]
        if isinstance(image, Jpeg):
            places.append(_later(image.size, cut.box, ends[-1] + (starts or {})[row]))
        else:
            places.append([end - box.numel(), 1, 3 * box.shape[1], 3])
        axes.append([_window(cut, axis, size) for axis in (0, 1)])
    turns = [[int(c.flip), q % 4] for c, q in zip(cuts, quarters or [0] * len(cuts), strict=True)]
    wide = max(axis.weights.shape[1] for pair in axes for axis in pair)
    weights = np.zeros((len(cuts), 2, size, wide), np.int16)
    for i, pair in enumerate(axes):
        for j, axis in enumerate(pair):
            weights[i, j, :, : axis.weights.shape[1]] = axis.weights
    return Packed(
        pixels,
        torch.tensor(places),
        torch.tensor(turns, dtype=torch.int32),
        torch.from_numpy(np.array([[axis.first for axis in pair] for pair in axes])),
        torch.from_numpy(weights),
        torch.tensor([[axis.shift for axis in pair] for pair in axes], dtype=torch.int32),
    )


def crop(packed: Packed) -> UInt8[Tensor, "b 3 s s"]:
    """Return the crops, on the device of `packed`."""
    if packed.pixels.is_cuda:
        try:
            from deepclust.data.images.crop_kernel import crop_by_triton
        except ImportError as error:
            raise ResourceError(
                f"data.crop_on=device needs Triton on a GPU ({error}): set data.crop_on=workers"
            ) from error
        return crop_by_triton(packed)
    return torch.stack([_crop_one(packed, i) for i in range(len(packed.places))])


def _crop_one(packed: Packed, i: int) -> UInt8[Tensor, "3 s s"]:
    """Return crop i in plain torch: the definition of what the kernel does."""
    offset, plane, row, column = packed.places[i].tolist()
    last = len(packed.pixels) - 1
    down, across = ((packed.first[i, axis], packed.weights[i, axis]) for axis in (0, 1))
    j = torch.arange(packed.weights.shape[-1])
    rows, columns = (first.long()[:, None] + j for first, _ in (down, across))
    lines = rows.flatten()
    at = offset + lines[:, None, None] * row + columns * column
    planes = torch.arange(3)[:, None, None, None] * plane
    values = packed.pixels[(planes + at).clamp_(max=last)].int()  # beyond an axis the weight is 0
    shifts = packed.shifts[i].tolist()
    lines_done = _shifted((values * across[1].int()).sum(-1), shifts[1])
    lines_done = lines_done.view(3, *rows.shape, -1)
    crop = _shifted((lines_done * down[1].int()[:, :, None]).sum(2), shifts[0]).to(torch.uint8)
    flip, quarter = packed.turns[i].tolist()
    return (crop.flip(-1) if flip else crop).rot90(quarter, (1, 2))


def _shifted(sums: Tensor, shift: int) -> Tensor:
    """Return sums divided by 2^shift, rounded half up, clipped to a byte."""
    return ((sums + (1 << (shift - 1))) >> shift).clamp_(0, 255)


def _window(cut: Cut, axis: int, size: int) -> Taps:
    """Return the taps of the square that is kept."""
    whole = taps(cut.box[2 + axis], cut.sides[axis])
    kept = slice(cut.corner[axis], cut.corner[axis] + size)
    return Taps(whole.first[kept], whole.weights[kept], whole.shift)


def _later(size: Size, box: tuple[int, int, int, int], start: int) -> list[int]:
    """Return a box's offset and strides in a whole image of three planes that begins at `start`."""
    return [start + box[0] * size.width + box[1], size.height * size.width, size.width, 1]


def _boxed(image: Tensor | Jpeg, box: tuple[int, int, int, int]) -> UInt8[Tensor, "h w 3"]:
    """Return the part of an image that a box holds, colours last; nothing of one that is encoded.

    A JPEG has no pixels yet.
    """
    if isinstance(image, Jpeg):
        return torch.empty(0, 0, 3, dtype=torch.uint8)
    top, left, height, width = box
    return image[:, top : top + height, left : left + width].permute(1, 2, 0)
