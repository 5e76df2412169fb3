"""Whether a PNG may be given to torchvision, whose decoder a damaged one can kill.

torchvision 0.29's `decode_png` ends the process (segmentation fault) when libpng reports an error
after the output has been allocated: libpng jumps out of the function, over C++ objects that are
then destroyed twice. A wrong byte in the pixel data is enough. Errors in the header are raised
properly. torchcodec met the same fault and cured it (meta-pytorch/torchcodec#1524, #1526).

So the pixel data is read here first, as libpng would: consecutive IDAT chunks with right checksums,
one zlib stream that ends where the rows end, and in front of every row a filter that exists.
"""

from __future__ import annotations

import struct
import zlib

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_FIRST_CHUNK = 8
_LAST_FILTER = 4


def is_sound(data: bytes | memoryview) -> bool:
    """Whether the pixel data is whole. False too for interlaced files, whose rows lie otherwise."""
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
    """The first run of IDAT chunks, joined; ValueError at a wrong checksum."""
    view, position = memoryview(data), _FIRST_CHUNK
    found: list[memoryview] = []
    while True:
        (length,) = struct.unpack_from(">I", view, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", view, end)
        if zlib.crc32(view[position + 4 : end]) != checksum:
            raise ValueError("wrong checksum")
        if bytes(view[position + 4 : position + 8]) == b"IDAT":
            found.append(view[position + 8 : end])
        elif found:
            return found[0] if len(found) == 1 else b"".join(found)
        position = end + 4
