"""What a shard stores of an image: its own bytes, or a PNG where shards have no name for it.

An image of many pages gives its first one, which is counted. One that cannot be converted is left
out, which is counted too. JPEG, WebP and PNG are not decoded, so a damaged one is packed as it is.
PNG and PPM of 16 bits are looked at, since 12 bits in them would be black.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.images.formats import has_16_bits, sniff
from deepclust.data.images.levels import AUTO, REMEDY, UNKNOWN, Levels, UnknownRangeError
from deepclust.data.pack.tally import Tally, shown
from deepclust.data.pack.walk import COPIED
from deepclust.errors import DataError

FIRST_PAGE = "of several pages: only the first is packed"
_NO_RANGE = f"with values whose black and white are unknown. {REMEDY}"
_COPIED_KINDS = ("jpg", "png", "webp")
_CONVERTED_KINDS = ("tif", "jp2", "heic")  # even if called .jpg: many bits, or a plugin
_PILLOW = {"gif": "GIF", "tif": "TIFF", "avif": "AVIF"}
_PNG_LEVEL = 1  # zlib: 20 % faster than 6 on a 28 x 28 image, and 1 % larger
_PNG_CONTROL = 512  # bytes that hold the chunk of an animation, which comes before the pixels
_OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_STORAGE = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)


class LeftOutError(Exception):
    """An image that is not packed; it is counted already."""


@dataclass(frozen=True)
class Packer:
    """How image files become members of shards, with counts of what was left and what was lost."""

    levels: Levels = AUTO
    left: Tally = field(default_factory=Tally)
    notes: Tally = field(default_factory=Tally)

    def member(self, file: str, read: Callable[[], bytes]) -> tuple[str, bytes]:
        """Return the extension and the bytes to store; `file` is the image's name in messages.

        Raises LeftOutError, and DataError where the storage fails and not a file.
        """
        try:
            return self._member(file, read())
        except OSError as error:
            if error.errno in _OUR_LIMITS + _STORAGE:
                raise DataError(f"cannot read {shown(file)}: {error.strerror}.") from error
            self.left.add(f"unreadable: {error.strerror or error}", file)
        except UnknownRangeError as error:
            self.left.add(_NO_RANGE, f"{file}: {error}".partition(UNKNOWN)[0])
        except DecodeError as error:
            self.left.add("that cannot be converted", f"{file}: {error}")
        raise LeftOutError

    def _member(self, file: str, data: bytes) -> tuple[str, bytes]:
        extension, kind = os.path.splitext(file)[1].lower(), sniff(data)
        if _has_pages(kind, data):
            self.notes.add(FIRST_PAGE, file)
        if kind is None and extension in COPIED:
            self.notes.add("not an image by its first bytes: packed as it is", file)
        named = extension in COPIED and kind not in _CONVERTED_KINDS
        if not named and kind not in _COPIED_KINDS:
            return "png", self._png(data)
        if has_16_bits(data) and (converted := self._of_16_bits(data)) is not None:
            return "png", converted
        return extension[1:] if named else str(kind), data

    def _of_16_bits(self, data: bytes) -> bytes | None:
        """Return 8 bits for a range that was given, or None for bytes that are stored."""
        try:
            converted = self._png(data)
        except UnknownRangeError:
            raise
        except DecodeError:
            return None  # packed as it is, as all damaged images that are not converted
        return converted if self.levels.rule == "given" else None

    def _png(self, data: bytes) -> bytes:
        pixels = decode(data, levels=self.levels)
        return png(Image.fromarray(pixels.permute(1, 2, 0).numpy()))


def png(image: Image.Image) -> bytes:
    """Return the image as a lightly compressed PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _has_pages(kind: str | None, data: bytes) -> bool:
    """Return whether there is more than one picture in a file."""
    if kind == "png":
        return b"acTL" in data[:_PNG_CONTROL]
    if kind == "webp":
        return data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 2)
    if kind not in ("gif", "tif", "avif"):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=(_PILLOW[kind],)) as image:
            image.seek(1)
    except Exception:  # one page, or damaged, of which `decode` tells
        return False
    return True
