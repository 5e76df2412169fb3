"""The Triton kernel of `device_crops.py`: crop, resize, flip and turn by integers, in one pass.

A program makes one row of one plane of one crop. It resizes every line that the row needs along the
line, and adds it up. Nothing lies in memory between the two. Only `crop` may import this module,
since Triton is not everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import UInt8
from torch import Tensor

from deepclust.data.images.device_crops import Packed


def crop_by_triton(packed: Packed) -> UInt8[Tensor, "b 3 s s"]:
    """Return the crops, as `device_crops.crop` defines them."""
    count, _, size, wide = packed.weights.shape
    crops = torch.empty(count, 3, size, size, dtype=torch.uint8, device=packed.pixels.device)
    # else Triton launches on torch's present card
    with torch.cuda.device_of(packed.pixels):  # type: ignore[no-untyped-call]
        _crop[(size, 3, count)](
            packed.pixels, packed.places, packed.turns, packed.first, packed.weights,
            packed.shifts, crops, size, wide, LANES=triton.next_power_of_2(size),
        )  # fmt: skip
    return crops


@triton.jit
def _crop(pixels, places, turns, first, weights, shifts, crops, size, wide, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    y, plane, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x = tl.arange(0, LANES)
    inside = x < size
    offset = tl.load(places + image * 4) + plane * tl.load(places + image * 4 + 1)
    row, column = tl.load(places + image * 4 + 2), tl.load(places + image * 4 + 3)
    down, across = image * 2 * size + y, (image * 2 + 1) * size + x
    shift_down, shift_across = tl.load(shifts + image * 2), tl.load(shifts + image * 2 + 1)
    top = tl.load(first + down)
    left = tl.load(first + across, mask=inside, other=0)
    total = tl.zeros((LANES,), tl.int32) + (1 << (shift_down - 1))
    for i in range(wide):
        weight_down = tl.load(weights + down * wide + i).to(tl.int32)
        if weight_down > 0:  # there may be no such line below the last
            line = tl.zeros((LANES,), tl.int32) + (1 << (shift_across - 1))
            at = pixels + offset + (top + i) * row + left * column
            for j in range(wide):
                weight = tl.load(weights + across * wide + j, mask=inside, other=0).to(tl.int32)
                value = tl.load(at + j * column, mask=weight > 0, other=0).to(tl.int32)
                line += weight * value
            line = tl.minimum(tl.maximum(line >> shift_across, 0), 255)
            total += weight_down * line
    total = tl.minimum(tl.maximum(total >> shift_down, 0), 255)
    x = tl.where(tl.load(turns + image * 2) > 0, size - 1 - x, x)
    quarter = tl.load(turns + image * 2 + 1)
    # counter-clockwise by a quarter: what was at (y, x) is at (size - 1 - x, y)
    to_y = tl.where(quarter == 1, size - 1 - x, tl.where(quarter == 3, x, y))
    to_y = tl.where(quarter == 2, size - 1 - y, to_y)
    to_x = tl.where(quarter == 1, y, tl.where(quarter == 3, size - 1 - y, x))
    to_x = tl.where(quarter == 2, size - 1 - x, to_x)
    out = crops + (image * 3 + plane).to(tl.int64) * size * size
    tl.store(out + to_y * size + to_x, total.to(tl.uint8), mask=inside)
