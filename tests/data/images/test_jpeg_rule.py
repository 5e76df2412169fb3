"""A file's bytes alone say whether a GPU decodes it."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepclust.data.images.decode import decode
from deepclust.data.images.headers import jpeg_segments
from deepclust.data.images.jpeg_rule import size_of_plain
from tests.images import draw, encode

PICTURE = draw(3, 40, 50)
PLAIN = encode(PICTURE, "jpg")
FRAME, SCAN = 0xC0, 0xDA


def of_mode(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE.permute(1, 2, 0).numpy()).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    return encode(PICTURE, "jpg", exif=exif.tobytes())


def changed(marker: int, offset: int, *values: int) -> bytes:
    """A plain JPEG with other bytes at `offset` from what follows a segment's length."""
    segment = next(one for one in jpeg_segments(PLAIN) if one.marker == marker)
    whole = bytearray(PLAIN)
    whole[segment.start + offset : segment.start + offset + len(values)] = bytes(values)
    return bytes(whole)


def with_segment(marker: int, body: bytes) -> bytes:
    """A plain JPEG with one more segment after its first bytes."""
    length = (len(body) + 2).to_bytes(2, "big")
    return PLAIN[:2] + bytes([0xFF, marker]) + length + body + PLAIN[2:]


def adobe(transform: int) -> bytes:
    return with_segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


TAKEN: dict[str, Callable[[], bytes]] = {
    "4:2:0": lambda: PLAIN,
    "4:2:2": lambda: encode(PICTURE, "jpg", subsampling=1),
    "4:4:4": lambda: encode(PICTURE, "jpg", subsampling=0),
    "grey": lambda: of_mode("L"),
    "with restarts": lambda: encode(PICTURE, "jpg", restart_marker_blocks=2),
    "a comment": lambda: with_segment(0xFE, b"\xff\xda no scan"),
    "upright by EXIF": lambda: turned(1),
    "YCbCr by Adobe": lambda: adobe(1),
}
LEFT: dict[str, Callable[[], bytes]] = {
    "progressive": lambda: encode(PICTURE, "jpg", progressive=True),
    "extended": lambda: changed(FRAME, -3, 0xC1),
    "arithmetic": lambda: changed(FRAME, -3, 0xC9),
    "12 bits": lambda: changed(FRAME, 0, 12),
    "of no height": lambda: changed(FRAME, 1, 0, 0),
    "two components": lambda: changed(FRAME, 5, 2),
    "odd subsampling": lambda: changed(FRAME, 7, 0x31),
    "chroma finer than luma": lambda: changed(FRAME, 7, 0x11, 0, 2, 0x21),
    "several scans": lambda: changed(SCAN, 0, 1),
    "CMYK": lambda: of_mode("CMYK"),
    "RGB": lambda: encode(PICTURE, "jpg", keep_rgb=True),
    "RGB by its ids": lambda: changed(FRAME, 6, 82, 0x11, 0, 71, 0x11, 1, 66),
    "RGB by Adobe": lambda: adobe(0),
    "turned by EXIF": lambda: turned(6),
    "EXIF cut short": lambda: with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x09\0"),
    "EXIF of no byte order": lambda: with_segment(0xE1, b"Exif\0\0nothing"),
    "cut short": lambda: PLAIN[:-200],
    "with more after its end": lambda: PLAIN + b"\0",
    "a header alone": lambda: PLAIN[:30] + b"\xff\xd9",
    "PNG": lambda: encode(PICTURE, "png"),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_gpu_takes_plain_jpegs_and_knows_their_size(name: str) -> None:
    data = TAKEN[name]()
    assert size_of_plain(data) == size_of_plain(memoryview(data)) == (40, 50)
    assert decode(data).shape == (3, 40, 50)


@pytest.mark.parametrize("name", LEFT)
def test_all_else_is_left_to_the_cpu(name: str) -> None:
    assert size_of_plain(LEFT[name]()) is None


@given(at=st.integers(2, 600), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_damaged_headers_are_no_error_of_the_rule(at: int, value: int, cut: int) -> None:
    damaged = bytearray(PLAIN[: len(PLAIN) - cut])
    damaged[at] = value
    size = size_of_plain(bytes(damaged))
    assert size is None or min(size) > 0
