"""More than 8 bits: a stated rule, and no image that becomes black in silence."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.data.images.decode import decode
from deepclust.data.images.levels import AUTO, STORED, DecodeError, Levels
from deepclust.errors import RecipeError

RAMP = np.add.outer(np.arange(12), np.arange(16)) / 26
TRUTH = torch.from_numpy(np.rint(RAMP * 255).astype(np.uint8))
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
KINDS = {
    "12 bits in 16": (np.rint(RAMP * 4095).astype("u2"), UNSIGNED),
    "14 bits in 16": (np.rint(RAMP * 16383).astype("u2"), UNSIGNED),
    "12 bits in 16, colour": (np.rint(np.stack([RAMP] * 3, -1) * 4095).astype("u2"), UNSIGNED),
    "signed 16": (np.rint(RAMP * 32767).astype("i2"), SIGNED),
    "signed 8": (np.rint(RAMP * 127).astype("i1"), SIGNED),
    "unsigned 32": (np.rint(RAMP * 4e9).astype("u4"), UNSIGNED),
    "float to 255": ((RAMP * 255).astype("f4"), FLOAT),
    "float below 0": ((RAMP - 0.5).astype("f4"), FLOAT),
    "float with NaN": (np.where(RAMP > 0.9, np.nan, RAMP).astype("f4"), FLOAT),
    "float64": (RAMP, FLOAT),
}


def tiff(pixels: np.ndarray, kind: int, photometric: int = 1) -> bytes:
    """A TIFF of one strip, written without Pillow."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    photometric = 2 if channels == 3 else photometric
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    rows = [(256, 4, pixels.shape[1]), (257, 4, pixels.shape[0]), (258, 3, 8 * pixels.itemsize)]
    rows += [(259, 3, 1), (262, 3, photometric), (273, 4, 0), (277, 3, channels)]
    rows += [(278, 4, pixels.shape[0]), (279, 4, len(data)), (339, 3, kind)]
    after = 8 + 2 + 12 * len(rows) + 4
    tags = b""
    for tag, code, value in rows:
        many = tag in (258, 339) and channels == 3
        extra = after if tag == 258 else after + 6
        value = extra if many else after + 12 if tag == 273 else value
        tags += struct.pack("<HHII", tag, code, 3 if many else 1, value)
    tail = struct.pack("<6H", *[8 * pixels.itemsize] * 3, *[kind] * 3)
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + tags + bytes(4) + tail + data


def png16(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_an_unknown_range_are_refused_by_name(kind: str) -> None:
    with pytest.raises(DecodeError, match=r"--range|Convert it"):
        decode(tiff(*KINDS[kind]), levels=AUTO)


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (tiff(np.rint(RAMP * 65535).astype("u2"), UNSIGNED), "auto"),
        (tiff(np.rint((1 - RAMP) * 65535).astype("u2"), UNSIGNED, photometric=0), "auto"),
        (tiff(RAMP.astype("f4"), FLOAT), "auto"),
        (tiff(np.rint(RAMP * 4095).astype("u2"), UNSIGNED), "0:4095"),
        (tiff(np.rint((1 - RAMP) * 4095).astype("u2"), UNSIGNED, photometric=0), "0:4095"),
        (tiff(np.rint(RAMP * 4095 - 1024).astype("i2"), SIGNED), "-1024:3071"),
        (tiff(np.rint(RAMP * 65535 - 32768).astype("i2"), SIGNED), "full"),
        (tiff(np.rint(RAMP * 4294967295).astype("u4"), UNSIGNED), "full"),
        (tiff((RAMP * 20 - 5).astype("f4"), FLOAT), "-5:15"),
        (png16(np.rint(RAMP * 4095).astype("u2")), "0:4095"),
        (b"P5 16 12 65535\n" + np.rint(RAMP * 1023).astype(">u2").tobytes(), "0:1023"),
        (b"P5 16 12 4095\n" + np.rint(RAMP * 4095).astype(">u2").tobytes(), "auto"),
    ],
)
def test_a_ramp_is_the_same_picture_in_every_type(data: bytes, levels: str) -> None:
    image = decode(data, levels=Levels.parse(levels))
    assert (image[0].int() - TRUTH.int()).abs().max() <= 1
    assert torch.equal(image[0], image[2])


def test_shards_of_16_bits_are_read_as_full_and_black_is_black() -> None:
    dim = np.rint(RAMP * 4095).astype("u2")
    assert decode(png16(dim)).max() == 16
    assert STORED.to_8_bits(np.arange(65536, dtype=np.uint16)).sum() == 65536 * 255 // 2
    assert not decode(png16(np.zeros((4, 4), "u2")), levels=AUTO).any()


def test_nan_is_black_where_a_range_was_given() -> None:
    image = decode(tiff(*KINDS["float with NaN"]), levels=Levels.parse("0:1"))
    assert image[0][RAMP > 0.9].max() == 0


def test_colour_of_16_bits_is_rounded_in_large_pngs_too() -> None:
    random = np.random.default_rng(0)
    for side in (16, 96):
        values = random.integers(0, 65536, (side, side, 3), dtype=np.uint16)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        expected = torch.from_numpy(((values.astype(int) + 128) // 257).astype(np.uint8))
        assert torch.equal(decode(raw_png(side, rows)).permute(1, 2, 0), expected)


def raw_png(side: int, rows: bytes) -> bytes:
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "1", "4:3", "0:nan", "0:inf", "a:b", "1:2:3", "stored"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="LOW:HIGH"):
        Levels.parse(text)
