"""Which JPEGs are plain: a rule of the file's bytes alone, so the same on every rank and day.

A GPU, or a decoder of smaller images (`reduced.py`), takes them. Plain is baseline, 8 bits, grey or
YCbCr in one scan, upright, with its end. All else is decoded whole on the CPU. That is progressive,
arithmetic and 12-bit ones, CMYK, RGB, odd subsampling, and what EXIF turns, or may turn. A file
without its end goes there too, since decoders differ in what they forgive. Neither load nor the
size of a batch has a say.

Sources: ITU-T T.81 (segments), the Adobe marker and the ids of RGB as libjpeg reads them, EXIF 2.3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from deepclust.data.images.headers import JpegSegment, Size, jpeg_segments

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _SCAN, _APP1, _APP14 = 0xC0, 0xDA, 0xE1, 0xEE
_SAMPLED = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))  # of luma, against (1, 1) of both chromas
_RGB_IDS = (82, 71, 66)
_YCBCR = 1  # of the Adobe marker
_ORIENTATION, _UPRIGHT = 0x0112, 1
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}


class _Component(NamedTuple):
    id: int
    across: int
    down: int


def size_of_plain(data: bytes | memoryview) -> Size | None:
    """Return the size of a plain JPEG, None for all other files.

    Nothing is decoded, and no bytes are an error.
    """
    if bytes(data[:2]) != _START or bytes(data[-2:]) != _END:
        return None
    try:
        return _plain_size(data)
    except (ValueError, IndexError, struct.error):
        return None


def _plain_size(data: bytes | memoryview) -> Size | None:
    """Return the size of a plain JPEG, by all segments up to its first scan."""
    frame: JpegSegment | None = None
    for segment in jpeg_segments(data):
        if segment.is_frame:
            frame = segment
        elif segment.marker == _SCAN:
            break
        elif _is_odd(segment, data):
            return None
    assert segment.marker == _SCAN  # the walk has no other end
    if frame is None or frame.marker != _BASELINE:
        return None
    bits, height, width, count = struct.unpack_from(">BHHB", data, frame.start)
    whole = bits == 8 and height > 0 and width > 0 and data[segment.start] == count
    return Size(height, width) if whole and _has_plain_colours(data, frame, count) else None


def _has_plain_colours(data: bytes | memoryview, frame: JpegSegment, count: int) -> bool:
    """Return whether a frame is grey or YCbCr, subsampled as every decoder can."""
    places = range(frame.start + 6, frame.start + 6 + 3 * count, 3)
    parts = [_Component(data[at], data[at + 1] >> 4, data[at + 1] & 15) for at in places]
    sampled = [(part.across, part.down) for part in parts]
    if count == 1:
        return sampled == [(1, 1)]
    is_rgb = tuple(part.id for part in parts) == _RGB_IDS
    return count == 3 and not is_rgb and sampled[0] in _SAMPLED and sampled[1:] == [(1, 1)] * 2


def _is_odd(segment: JpegSegment, data: bytes | memoryview) -> bool:
    """Return whether a segment says that colours are no YCbCr, or that the image is turned."""
    if segment.marker not in (_APP1, _APP14):
        return False
    body = bytes(data[segment.start : segment.stop])
    if segment.marker == _APP14:
        return body[:5] == b"Adobe" and body[11:12] != bytes([_YCBCR])
    return body[:6] == b"Exif\0\0" and _is_turned(body[6:])


def _is_turned(exif: bytes) -> bool:
    """Return whether EXIF has another orientation than upright; `struct.error` if it is damaged."""
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return True
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    entries = (struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i) for i in range(count))
    return any(tag == _ORIENTATION and value != _UPRIGHT for tag, _, _, value in entries)
