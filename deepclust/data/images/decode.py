"""Bytes of an image to uint8 [3, h, w]: whatever was stored becomes upright RGB.

JPEG, WebP and small PNGs are decoded by torchvision's native code, and PPM by NumPy. Everything
else, and what these refuse, is decoded by Pillow. Grey is repeated, palettes are looked up, CMYK is
converted, and 16 bits are rounded to 8. Alpha is dropped, not blended, as by Pillow's
`convert("RGB")`. EXIF orientation is applied.

A damaged PNG can kill torchvision's decoder, so `png_check.py` reads it first. With the check
torchvision takes half of Pillow's time for 28 x 28 pixels, and all of it from about 64 x 64 on.
Larger files go to Pillow at once.

torchvision's registered ops are called, not `torchvision.io`. Its functions warn since 0.29 that
they will move to torchcodec, and they double the time of a 28 x 28 PNG. Where the ops are missing,
Pillow decodes, which takes three times as long.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchvision  # noqa: F401 - registers torch.ops.image
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from deepclust.data.images import headers, png_check
from deepclust.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's limit for an error: 2 GiB / 3 bytes / 4

_RGB = 3  # torchvision.io.ImageReadMode.RGB
_UPRIGHT = True
_SMALL_PNG = 8192  # bytes
# What Pillow may open. Its other plugins are never wanted here, and some start programs (EPS:
# Ghostscript). "JPEG" includes MPO, what cameras with two lenses write.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "GIF", "TIFF")
_NATIVE_REFUSES = (RuntimeError, AttributeError)  # AttributeError: torchvision without its ops


class DecodeError(DataError):
    """An image that cannot be decoded, with the reason and without the sample's name."""


class _Format(NamedTuple):
    size: Callable[[bytes | memoryview], headers.Size]
    decode: Callable[[bytes | memoryview], Tensor]


def decode(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 h w"]:
    """Decode one image.

    Raises `DecodeError` with the reason: not an image, damaged, truncated, or larger than
    `max_pixels` by its header, which is known before anything is decoded.
    """
    known = _FORMATS.get(bytes(data[:2]))
    if known is None:
        return _by_pillow(data, max_pixels)
    try:
        height, width = known.size(data)
    except (ValueError, IndexError, struct.error) as error:
        raise DecodeError(f"damaged or truncated in its header ({len(data)} bytes)") from error
    _refuse_bomb(height, width, max_pixels)
    try:
        image = known.decode(data)
    except _NATIVE_REFUSES:
        return _by_pillow(data, max_pixels)
    return image if image.dtype == torch.uint8 else _to_8_bits(image)


def _refuse_bomb(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(
            f"{width} x {height} pixels, more than the limit of {max_pixels} (data.max_pixels)"
        )


def _tensor(data: bytes | memoryview) -> UInt8[Tensor, " bytes"]:
    # copied, because torch warns about memory that it may not write
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode_jpeg(data: bytes | memoryview) -> Tensor:
    image: Tensor = torch.ops.image.decode_jpeg(_tensor(data), _RGB, _UPRIGHT)
    return image


def _decode_png(data: bytes | memoryview) -> Tensor:
    if len(data) > _SMALL_PNG or not png_check.is_sound(data):
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
    if largest != 255:
        pixels = np.rint(pixels.astype(np.float32).clip(0, largest) * (255 / largest))
    rgb = np.broadcast_to(pixels.astype(np.uint8), (height, width, 3))
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _to_8_bits(image: Tensor) -> UInt8[Tensor, " *shape"]:
    """Round 0..65535 to 0..255 (65535 = 257 * 255)."""
    return ((image.to(torch.int32) + 128) // 257).to(torch.uint8)


def _by_pillow(data: bytes | memoryview, max_pixels: int) -> UInt8[Tensor, "3 h w"]:
    if not len(data):
        raise DecodeError("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as stored:
                _refuse_bomb(stored.height, stored.width, max_pixels)
                return _pillow_to_tensor(ImageOps.exif_transpose(stored))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = str(error).partition(" <_io")[0] or type(error).__name__
        raise DecodeError(f"damaged, truncated or not an image: {reason}") from error


def _pillow_to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    if image.mode.startswith("I"):  # 16 bits; `convert` would clip at 255
        grey = torch.from_numpy(np.asarray(image).astype(np.int32))
        return _to_8_bits(grey.clamp(0, 65535)).expand(3, -1, -1).contiguous()
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


_FORMATS: dict[bytes, _Format] = {
    b"\xff\xd8": _Format(headers.jpeg_size, _decode_jpeg),
    b"\x89P": _Format(headers.png_size, _decode_png),
    b"RI": _Format(headers.webp_size, _decode_webp),
    b"P5": _Format(headers.ppm_size, _decode_ppm),
    b"P6": _Format(headers.ppm_size, _decode_ppm),
}
