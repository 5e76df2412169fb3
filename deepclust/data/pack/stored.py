"""What a shard stores of an image: its own bytes, or a PNG where shards have no name for it.

An image of many pages gives its first one, which is counted. One that cannot be converted is left
out, which is counted too. JPEG, WebP and PNG are not decoded, so a damaged one is packed as it is.
PNG and PPM of 16 bits are looked at, since 12 bits in them would be black.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.images.formats import has_16_bits, sniff
from deepclust.data.images.levels import AUTO, REMEDY, UNKNOWN, Levels, UnknownRangeError
from deepclust.data.pack.blobs import read_file, read_head
from deepclust.data.pack.tally import Tally, shown
from deepclust.data.pack.walk import COPIED
from deepclust.errors import DataError

FIRST_PAGE = "of several pages: only the first is packed"
_NO_RANGE = f"with values whose black and white are unknown. {REMEDY}"
_COPIED_KINDS = ("jpg", "png", "webp")
_CONVERTED_KINDS = ("tif", "jp2", "heic")  # even if called .jpg: many bits, or a plugin
_PILLOW = {"gif": "GIF", "tif": "TIFF", "avif": "AVIF"}
_PNG_LEVEL = 1  # zlib: 20 % faster than 6 on a 28 x 28 image, and 1 % larger
LOOK = 512  # bytes that hold a PNG's chunk of an animation, which comes before the pixels
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
        with self._counted(file):
            return self._member(file, read())

    def stored(self, file: str, path: Path) -> tuple[str, int]:
        """Return the extension and the bytes of what `member` would return of an image file.

        Of one that is stored as it is, the beginning is read. Raises as `member` does.
        """
        with self._counted(file):
            head, size = read_head(path, LOOK)
            extension = self.copied(file, head)
            if extension is not None:
                return extension, size
            extension, data = self._member(file, read_file(path))
            return extension, len(data)

    @contextlib.contextmanager
    def _counted(self, file: str) -> Iterator[None]:
        """Count an image that cannot be stored, and raise LeftOutError instead of the reason."""
        try:
            yield
            return
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
        self._note(file, data)
        extension = copied_as(file, data)
        if extension is None:
            return "png", self.png(data)
        if has_16_bits(data) and (converted := self._of_16_bits(data)) is not None:
            return "png", converted
        return extension, data

    def copied(self, file: str, head: bytes) -> str | None:
        """Return the extension of a member that has the file's own bytes, by its first `LOOK` ones.

        None is for an image that `member` has to look at as a whole.
        """
        extension = copied_as(file, head)
        if extension is None or has_16_bits(head):
            return None
        self._note(file, head)
        return extension

    def _note(self, file: str, data: bytes) -> None:
        kind = sniff(data)
        if _has_pages(kind, data):
            self.notes.add(FIRST_PAGE, file)
        if kind is None and os.path.splitext(file)[1].lower() in COPIED:
            self.notes.add("not an image by its first bytes: packed as it is", file)

    def _of_16_bits(self, data: bytes) -> bytes | None:
        """Return 8 bits for a range that was given, or None for bytes that are stored."""
        try:
            converted = self.png(data)
        except UnknownRangeError:
            raise
        except DecodeError:
            return None  # packed as it is, as all damaged images that are not converted
        return converted if self.levels.rule == "given" else None

    def png(self, data: bytes) -> bytes:
        """Return the PNG that stands for an image in shards; raises DecodeError."""
        pixels = decode(data, levels=self.levels)
        return png(Image.fromarray(pixels.permute(1, 2, 0).numpy()))


def copied_as(file: str, head: bytes) -> str | None:
    """Return the extension of a member that has the file's own bytes, or None for a PNG of it."""
    extension, kind = os.path.splitext(file)[1].lower(), sniff(head)
    if extension in COPIED and kind not in _CONVERTED_KINDS:
        return extension[1:]
    return kind if kind in _COPIED_KINDS else None


def png(image: Image.Image) -> bytes:
    """Return the image as a lightly compressed PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _has_pages(kind: str | None, data: bytes) -> bool:
    """Return whether there is more than one picture in a file."""
    if kind == "png":
        return b"acTL" in data[:LOOK]
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
