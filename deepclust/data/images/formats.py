"""An image's format by its first bytes, whatever its name ends in.

Files of the web and of phones are often called something else than what they hold: .jfif, .jpe,
`.jpg?w=300`, or nothing at all.
"""

from __future__ import annotations

import re

HEAD = 64  # bytes that are enough for every format below

_PNG_DEPTH = 24  # the byte with the bits of a channel
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of the header that follows "BM" at byte 14
_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_MAGIC: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\xff\xd8\xff", "jpg"),
        (rb"\x89PNG\r\n\x1a\n", "png"),
        (rb"RIFF....WEBP", "webp"),
        (rb"P[1-6][\s#]", "ppm"),
        (rb"GIF8[79]a", "gif"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "tif"),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "jp2"),
    )
)


def sniff(head: bytes | memoryview) -> str | None:
    """Return jpg, png, webp, ppm, gif, bmp, tif, jp2, avif or heic, or None for anything else.

    `head` are the file's first `HEAD` bytes, or more.
    """
    head = bytes(head[:HEAD])
    for magic, name in _MAGIC:
        if magic.match(head):
            return name
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    # "BM" alone begins many a text, so two more fields have to fit
    is_bmp = head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return "bmp" if is_bmp else None


def has_16_bits(data: bytes | memoryview) -> bool:
    """Return whether a PNG has 16 bits a channel, or a PPM values up to 65535."""
    kind = sniff(data)
    if kind == "png":
        return bytes(data[_PNG_DEPTH : _PNG_DEPTH + 1]) == b"\x10"
    return kind == "ppm" and b"65535" in bytes(data[:HEAD])


def _of_brands(head: bytes) -> str | None:
    """Tell AVIF from HEIC, and both from a film, by the brands of an ISO media file."""
    size = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, min(size, HEAD), 4))]
    if any(brand in _AVIF for brand in brands):
        return "avif"
    return "heic" if any(brand in _HEIC for brand in brands) else None
