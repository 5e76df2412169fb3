"""A check of PNGs before they go to torchvision, whose decoder a damaged one can kill.

torchvision 0.29's `decode_png` ends the process (segmentation fault) when libpng reports an error
in the pixel data. libpng then jumps out of the function, over C++ objects that are destroyed twice.
Errors in the header are raised properly. torchcodec had the same fault and mended it
(meta-pytorch/torchcodec#1524, #1526).

So the pixel data is checked here first: consecutive IDAT chunks with right checksums, and one zlib
stream that ends where the rows end. Every row must begin with a known filter.
"""

from __future__ import annotations

import struct
import zlib

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_FIRST_CHUNK = 8
_LAST_FILTER = 4


def is_sound(data: bytes | memoryview) -> bool:
    """Return whether the pixel data is whole, and False for interlaced files."""
    try:
        width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
        row = 1 + (width * depth * _CHANNELS[colour] + 7) // 8
        stream = zlib.decompressobj()
        rows = stream.decompress(_pixel_data(data), row * height + 1)
    except (struct.error, KeyError, ValueError, zlib.error):
        return False
    whole = stream.eof and len(rows) == row * height > 0 and not interlaced
    return whole and max(rows[::row]) <= _LAST_FILTER


def _pixel_data(data: bytes | memoryview) -> bytes | memoryview:
    """Join the first run of IDAT chunks, or raise ValueError at a wrong checksum."""
    view, position = memoryview(data), _FIRST_CHUNK
    chunks: list[memoryview] = []
    while True:
        (length,) = struct.unpack_from(">I", view, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", view, end)
        if zlib.crc32(view[position + 4 : end]) != checksum:
            raise ValueError("wrong checksum")
        if bytes(view[position + 4 : position + 8]) == b"IDAT":
            chunks.append(view[position + 8 : end])
        elif chunks:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        position = end + 4
