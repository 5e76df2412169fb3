"""Bytes of an image to uint8 [3, h, w]: whatever was stored becomes upright RGB.

JPEG, WebP and small PNGs are decoded by torchvision's native code, and PPM by NumPy. Everything
else, and what these refuse, is decoded by Pillow (`pillow.py`). Grey is repeated, palettes are
looked up, CMYK is converted, and 16 bits are rounded to 8 (`levels.py`). Alpha is dropped, not
blended, as by Pillow's `convert("RGB")`. EXIF orientation is applied, where it can be read.

A damaged PNG can kill torchvision's decoder, so `png_check.py` reads it first. With the check
torchvision takes half of Pillow's time for 28 x 28 pixels, and all of it from about 64 x 64 on.
Larger files go to Pillow at once, unless they have 16 bits, of which Pillow keeps 8 in colour.

torchvision's registered ops are called, not `torchvision.io`. Its functions warn since 0.29 that
they will move to torchcodec, and they double the time of a 28 x 28 PNG. Where the ops are missing,
Pillow decodes, which takes three times as long.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchvision  # registers torch.ops.image
from jaxtyping import UInt8
from torch import Tensor

from deepclust.data.images import headers, png_check
from deepclust.data.images.levels import STORED, DecodeError, Levels
from deepclust.data.images.pillow import by_pillow

__all__ = ["MAX_PIXELS", "DecodeError", "decode"]

MAX_PIXELS = 178_956_970  # Pillow's limit for an error: 2 GiB / 3 bytes / 4

NATIVE = ("decode_jpeg", "decode_png", "decode_webp")  # registered by torchvision
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_UPRIGHT = True
_SMALL_PNG = 8192  # bytes
_PNG_DEPTH = 24  # the byte that holds the bits of a channel
_NATIVE_REFUSES = (RuntimeError, AttributeError)  # AttributeError: torchvision without its ops


def notes() -> list[str]:
    """Return what a user should know of the decoders here: which of torchvision's are missing."""
    missing = [name for name in NATIVE if not hasattr(torch.ops.image, name)]
    if not missing:
        return []
    return [
        f"torchvision {torchvision.__version__} has no {', '.join(missing)} here, so Pillow "
        "decodes such images, in about three times the time. Install the torchvision that belongs "
        f"to torch {torch.__version__}"
    ]


class _Format(NamedTuple):
    size: Callable[[bytes | memoryview], headers.Size]
    decode: Callable[[bytes | memoryview], Tensor]


def decode(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, levels: Levels = STORED
) -> UInt8[Tensor, "3 h w"]:
    """Decode one image; `levels` says what is black and white where there are more than 8 bits.

    Raises `DecodeError` with the reason: not an image, damaged, truncated, or larger than
    `max_pixels` by its header, which is known before anything is decoded.
    """

    def check(height: int, width: int) -> None:
        check_size(height, width, max_pixels)

    image = _decode_natively(data, check)
    if image is None:
        image = by_pillow(data, levels, check)
    elif image.dtype != torch.uint8:
        image = torch.from_numpy(levels.to_8_bits(image.numpy()))
    if not image.numel():
        raise DecodeError("0 pixels")
    return image


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise `DecodeError` for an image with more pixels than `data.max_pixels` allows."""
    if height * width > max_pixels:
        raise DecodeError(
            f"{width} x {height} pixels, more than the limit of {max_pixels} (data.max_pixels)"
        )


def _decode_natively(
    data: bytes | memoryview, check_size: Callable[[int, int], None]
) -> Tensor | None:
    """Return the image, of 8 or 16 bits, or None for one that is left to Pillow."""
    known = _FORMATS.get(bytes(data[:2]))
    if known is None:
        return None
    try:
        check_size(*known.size(data))
        return known.decode(data)
    except DecodeError:
        raise
    except (ValueError, IndexError, struct.error, *_NATIVE_REFUSES):
        return None  # Pillow forgives what a native decoder or its header's reader does not


def _tensor(data: bytes | memoryview) -> UInt8[Tensor, " bytes"]:
    # copied, because torch warns about memory that it may not write
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode_jpeg(data: bytes | memoryview) -> Tensor:
    image: Tensor = torch.ops.image.decode_jpeg(_tensor(data), _RGB, _UPRIGHT)
    return image


def _decode_png(data: bytes | memoryview) -> Tensor:
    if (len(data) > _SMALL_PNG and data[_PNG_DEPTH] <= 8) or not png_check.is_sound(data):
        raise RuntimeError("left to Pillow")
    image: Tensor = torch.ops.image.decode_png(_tensor(data), _RGB, _UPRIGHT)
    return image


def _decode_webp(data: bytes | memoryview) -> Tensor:
    if headers.webp_has_exif(data):
        raise RuntimeError("torchvision does not turn WebP images")
    image: Tensor = torch.ops.image.decode_webp(_tensor(data), _RGB)
    return image


def _decode_ppm(data: bytes | memoryview) -> Tensor:
    height, width, largest, start = headers.ppm_header(data)
    channels = 3 if bytes(data[:2]) == b"P6" else 1
    stored = np.dtype(np.uint8 if largest < 256 else ">u2")
    count = height * width * channels
    if not count or len(data) < start + count * stored.itemsize:
        raise DecodeError(f"truncated: {len(data)} bytes for {width} x {height} pixels")
    pixels = np.frombuffer(data, stored, count, start).reshape(height, width, channels)
    if largest == 65535:
        pixels = pixels.astype(np.uint16)  # of which `levels` decides
    elif largest != 255:
        pixels = np.rint(pixels.astype(np.float32).clip(0, largest) * (255 / largest))
        pixels = pixels.astype(np.uint8)
    rgb = np.broadcast_to(pixels, (height, width, 3))
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


_FORMATS: dict[bytes, _Format] = {
    b"\xff\xd8": _Format(headers.jpeg_size, _decode_jpeg),
    b"\x89P": _Format(headers.png_size, _decode_png),
    b"RI": _Format(headers.webp_size, _decode_webp),
    b"P5": _Format(headers.ppm_size, _decode_ppm),
    b"P6": _Format(headers.ppm_size, _decode_ppm),
}
