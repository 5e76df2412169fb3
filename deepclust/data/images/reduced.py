"""Large JPEGs decoded at 1/4 or 1/8 of their size, where all crops are still shrunk.

A JPEG holds frequencies of blocks of 8 x 8 pixels, so libjpeg can leave out the high ones (Pillow
calls it draft mode). The bits must be read all the same: images with grain take 0.65 to 0.75 of the
time, those of 12 megapixels 0.4. Pixels differ from those of the whole image, so
`data.decode=reduced` is a choice of the recipe.

The scale is the largest of which no crop of the image needs more pixels than there are. Then the
image is treated as if it had been stored so small. Which JPEGs are taken is a rule of their bytes
alone, that of `jpeg_rule.py`. Below a megapixel, and at 1/2, torchvision's decoder of the whole
image is as fast as Pillow's (tools/bench/reduced_decode.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from deepclust.data.images.decode import check_size, decode
from deepclust.data.images.device_crops import Cut, cut_of
from deepclust.data.images.headers import Size
from deepclust.data.images.jpeg_rule import size_of_plain
from deepclust.data.images.pillow import jpeg_at

SCALES = (8, 4)
LARGE = 1_000_000  # pixels


def decode_for(
    crops: Sequence[tuple[Any, Any]], data: bytes | memoryview, max_pixels: int, decoder: str
) -> UInt8[Tensor, "3 h w"]:
    """Decode an image for its crops, which are pairs of a view (`crops.py`) and a draw.

    `decoder` is the recipe's `data.decode`; a CPU does what was a GPU's. `max_pixels` is of the
    whole image. Raises `DecodeError` as `decode` does.
    """
    size = size_of_plain(data) if decoder == "reduced" else None
    if size is not None and size.height * size.width >= LARGE:
        check_size(*size, max_pixels)
        scale = scale_for(size, (cut_of(view, *size, draw) for view, draw in crops))
        reduced = None if scale == 1 else jpeg_at(data, scale)
        if reduced is not None:
            return reduced
    return decode(data, max_pixels)


def scale_for(size: Size, cuts: Iterable[Cut]) -> int:
    """Return the largest scale at which no cut is enlarged, 1 if there is none."""
    shrunk = min(
        (old / new for cut in cuts for old, new in zip(cut.box[2:], cut.sides, strict=True)),
        default=1.0,
    )
    return next((scale for scale in SCALES if scale <= min(shrunk, *size)), 1)
