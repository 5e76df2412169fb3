"""What Pillow decodes: rare formats, large PNGs, many bits, and what the native decoders refuse.

The pixels are read first. The orientation is metadata, so one that is damaged leaves the image as
it was stored. A PNG that cannot be read is tried again without its metadata.
"""

from __future__ import annotations

import importlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from deepclust.data.images.formats import has_16_bits, sniff
from deepclust.data.images.levels import (
    REMEDY,
    UNKNOWN,
    DecodeError,
    Levels,
    UnknownRangeError,
    is_dim,
)

# What Pillow may open. Its other plugins are never wanted here, and some start programs (EPS:
# Ghostscript). "JPEG" includes MPO, what cameras with two lenses write.
_FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_UNSIGNED, _SIGNED, _WHITE_IS_ZERO = 1, 2, 0
_PNG_START = 8
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")


def by_pillow(
    data: bytes | memoryview, levels: Levels, check_size: Callable[[int, int], None]
) -> UInt8[Tensor, "3 h w"]:
    """Decode any image that Pillow can; `check_size(height, width)` raises for too large ones.

    Raises DecodeError with the reason.
    """
    if not len(data):
        raise DecodeError("0 bytes")
    try:
        return _decode(bytes(data), levels, check_size)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        if sniff(data) == "png" and (bare := _without_metadata(bytes(data))) is not None:
            return by_pillow(bare, levels, check_size)
        raise DecodeError(f"damaged, truncated or not an image: {_reason(error, data)}") from error


def jpeg_at(data: bytes | memoryview, scale: int) -> UInt8[Tensor, "3 h w"] | None:
    """Decode a JPEG at 1 / scale (4, 8) of its size, rounded up; None where Pillow refuses it.

    The caller has checked the size, and that it is upright.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as stored:
                stored.draft("RGB", (stored.width // scale, stored.height // scale))
                pixels = np.array(stored.convert("RGB"))
    except Exception:  # whatever is damaged, the decoder of whole images says what
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode(data: bytes, levels: Levels, check_size: Callable[[int, int], None]) -> Tensor:
    formats = _FORMATS + _rare_formats(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=formats) as stored:
            check_size(stored.height, stored.width)
            stored.load()
            bits = 16 if has_16_bits(data) else 8
            pixels = _pixels(_upright(stored), stored, levels, bits)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _reason(error: Exception, data: bytes | memoryview) -> str:
    if isinstance(error, UnidentifiedImageError) and sniff(data) == "tif":
        return "a TIFF whose type Pillow cannot read, such as float64 or many bands. Convert it"
    return str(error).partition(" <_io")[0] or type(error).__name__


def _rare_formats(data: bytes) -> tuple[str, ...]:
    """Return the name of a plugin that not every Pillow has, if the image needs it."""
    name = sniff(data)
    if name == "avif":
        # `check` of an older Pillow does not know the name
        if "avif" not in features.modules or not features.check("avif"):
            raise DecodeError("AVIF, which this Pillow cannot read: pip install -U pillow")
        return ("AVIF",)
    if name == "jp2":
        if not features.check("jpg_2000"):
            raise DecodeError("JPEG 2000, which this Pillow cannot read: pip install -U pillow")
        return ("JPEG2000",)
    if name == "heic":
        _register_heif()
        return ("HEIF",)
    return ()


def _register_heif() -> None:
    try:
        plugin = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise DecodeError("HEIC, which needs a plugin: pip install pillow-heif") from error
    plugin.register_heif_opener()


def _without_metadata(data: bytes) -> bytes | None:
    """Return a PNG with only the chunks that its pixels need, or None if that changes nothing."""
    kept, position = [data[:_PNG_START]], _PNG_START
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        name = data[position + 4 : position + 8]
        if name in _PNG_KEPT and not (name == b"eXIf" and _is_torn(data[position:end])):
            kept.append(data[position:end])
        position = end
    bare = b"".join(kept)
    return bare if len(bare) < len(data) else None


def _is_torn(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big")


def _upright(stored: Image.Image) -> Image.Image:
    """Return the image turned by its EXIF orientation, if that can be read."""
    try:
        turn = _TURNS.get(stored.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever the metadata is, the pixels are whole
        turn = None
    return stored if turn is None else stored.transpose(turn)


def _pixels(image: Image.Image, stored: Image.Image, levels: Levels, bits: int) -> np.ndarray:
    """Return the image as uint8 [h, w, 3]; `stored` has the tags, `bits` is without them."""
    tags = getattr(stored, "tag_v2", {})
    bits = max(_tuple(tags.get(_BITS, bits)))
    kind = max(_tuple(tags.get(_SAMPLE_FORMAT, _UNSIGNED)))
    if image.mode.startswith("I") or image.mode == "F":
        values = _values(image, bits, kind)
        grey = levels.to_8_bits(values, (1 << bits) - 1 if tags and kind == _UNSIGNED else None)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        return np.broadcast_to(grey[..., None], (*grey.shape, 3))
    pixels = np.array(image.convert("RGB"))
    if kind == _SIGNED:
        raise UnknownRangeError(
            f"signed {bits} bits, which Pillow reads as unsigned. Convert it first."
        )
    if bits > 8:
        _check_cut(pixels, bits, levels)
    return pixels


def _values(image: Image.Image, bits: int, kind: int) -> np.ndarray:
    """Return the values in the type that was stored; Pillow has int32 for most of them."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        return values
    if kind == _SIGNED:
        return values.astype(np.int16) if bits == 16 else values
    return values.view(np.uint32) if bits == 32 else values.clip(0, 65535).astype(np.uint16)


def _check_cut(pixels: np.ndarray, bits: int, levels: Levels) -> None:
    """Refuse colour of 16 bits that Pillow has cut to the upper 8, where they are not enough."""
    if levels.rule == "given":
        raise UnknownRangeError(
            f"colour of {bits} bits, which Pillow cuts to 8. Convert it to plain 16 bit PNG."
        )
    if levels.rule == "auto" and is_dim(pixels):
        raise UnknownRangeError(
            f"colour of {bits} bits with values up to {256 * int(pixels.max()) + 255}"
            f"{UNKNOWN} {REMEDY}"
        )


def _tuple(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(v for v in values if isinstance(v, int)) or (8,)
