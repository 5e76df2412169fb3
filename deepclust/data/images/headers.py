"""An image's height and width from its first bytes, so that a bomb is refused before it is decoded.

There is one function per format. It takes the whole file's bytes, and raises ValueError, IndexError
or struct.error when the header is not there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

_PPM = re.compile(rb"P[56](?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s")
_LONGEST_PPM_HEADER = 4096
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})


class Size(NamedTuple):
    """Pixels down and across, as stored (before any EXIF rotation)."""

    height: int
    width: int


class PpmHeader(NamedTuple):
    """A PPM's or PGM's size, its largest value, and where its pixels begin."""

    height: int
    width: int
    largest: int
    start: int


def png_size(data: bytes | memoryview) -> Size:
    """PNG: the IHDR chunk is always the first."""
    width, height = struct.unpack_from(">II", data, 16)
    return Size(height, width)


class JpegSegment(NamedTuple):
    """A part of a JPEG: its marker's second byte, and where what follows its length begins."""

    marker: int
    start: int
    stop: int

    @property
    def is_frame(self) -> bool:
        """Whether it is a frame header (SOF0-15; not DHT, JPG, DAC)."""
        return self.marker in _JPEG_FRAMES


def jpeg_segments(data: bytes | memoryview) -> Iterator[JpegSegment]:
    """JPEG: yield the segments that have a length, one after the other, without end.

    After the header of the first scan come its bits, which are none.
    """
    position = 2
    while True:
        if data[position] != 0xFF:
            raise ValueError("no JPEG marker")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _JPEG_ALONE:
            position += 2
        else:
            stop = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
            yield JpegSegment(marker, position + 4, stop)
            position = stop


def jpeg_size(data: bytes | memoryview) -> Size:
    """JPEG: walk over the segments to the first frame header."""
    frame = next(segment for segment in jpeg_segments(data) if segment.is_frame)
    return Size(*struct.unpack_from(">HH", data, frame.start + 1))


def webp_size(data: bytes | memoryview) -> Size:
    """WebP: the canvas of an extended file, else of the lossy or lossless stream (RFC 9649)."""
    chunk = bytes(data[12:16])
    if chunk == b"VP8X":
        return Size(1 + _uint24(data, 27), 1 + _uint24(data, 24))
    if chunk == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return Size(1 + (packed >> 14 & 0x3FFF), 1 + (packed & 0x3FFF))
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Size(height & 0x3FFF, width & 0x3FFF)
    raise ValueError("no WebP header")


def webp_has_exif(data: bytes | memoryview) -> bool:
    """Return whether an extended WebP says that it carries EXIF, which may rotate it."""
    return bytes(data[12:16]) == b"VP8X" and bool(data[20] & 0x08)


def ppm_header(data: bytes | memoryview) -> PpmHeader:
    """PPM and PGM, binary (P6, P5): three numbers with comments between them."""
    match = _PPM.match(bytes(data[:_LONGEST_PPM_HEADER]))
    if match is None:
        raise ValueError("no PPM header")
    width, height, largest = map(int, match.groups())
    if not 0 < largest < 65536:
        raise ValueError(f"largest value {largest}")
    return PpmHeader(height, width, largest, match.end())


def ppm_size(data: bytes | memoryview) -> Size:
    """PPM and PGM, binary."""
    header = ppm_header(data)
    return Size(header.height, header.width)


def _uint24(data: bytes | memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")
