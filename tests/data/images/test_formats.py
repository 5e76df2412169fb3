"""Images by their first bytes, and sound pixels with broken metadata."""

from __future__ import annotations

import importlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.images.formats import sniff
from deepclust.errors import DataError
from tests.images import draw, encode
from tools.bench import fuzz_images

NAMES = {
    "jpg": "JPEG", "png": "PNG", "webp": "WEBP", "ppm": "PPM", "gif": "GIF", "bmp": "BMP",
    "tif": "TIFF", "jp2": "JPEG2000", "avif": "AVIF",
}  # fmt: skip
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(90)
NOISE = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 53, 53), dtype=np.uint8))
BODIES = {
    b"eXIf": b"garbage garbage",
    b"iCCP": b"icc\0\0" + zlib.compress(bytes(2 << 20), 9),
    b"zTXt": b"text\0\0" + zlib.compress(bytes(2 << 20), 9),
    b"iTXt": b"text\0\1\0\0\0" + zlib.compress(bytes(2 << 20), 9),
    b"tEXt": b"",
}


def with_chunk(data: bytes, name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + body) if checksum is None else checksum
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_known_by_its_first_bytes_and_decoded(name: str) -> None:
    data = encode(draw(0, 20, 30), NAMES[name])
    assert sniff(data) == name
    assert decode(data).shape == (3, 20, 30)


@pytest.mark.parametrize(
    "data", [b"", b"BMW is a car", b"P8 ", b"\0\0\0\x18ftypmp42" + bytes(60), b"RIFF....AVI "]
)
def test_texts_and_films_are_no_images(data: bytes) -> None:
    assert sniff(data) is None


def test_a_heic_without_its_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert sniff(HEIC) == "heic"
    with pytest.raises(DecodeError, match="pip install pillow-heif"):
        decode(HEIC)


@pytest.mark.parametrize("name", BODIES)
def test_sound_pixels_are_read_whatever_the_metadata(name: bytes) -> None:
    whole = encode(NOISE, "png")
    assert torch.equal(decode(with_chunk(whole, name, BODIES[name])), NOISE)
    assert torch.equal(decode(with_chunk(whole, name, b"x", checksum=0)), NOISE)


def test_a_webp_with_a_broken_exif_is_read() -> None:
    data = encode(NOISE, "webp", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(5))
    at = data.index(b"EXIF")
    odd = data[:at] + b"EXIF" + struct.pack("<I", 16) + b"garbage garbage!"
    odd = odd[:4] + struct.pack("<I", len(odd) - 8) + odd[8:]
    assert torch.equal(decode(odd), NOISE)


def test_an_image_of_0_pixels_is_an_error() -> None:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    at = data.index(b",", 13)
    data[6:10] = data[at + 5 : at + 9] = bytes(4)
    with pytest.raises(DataError):
        decode(bytes(data))


def test_damaged_images_end_in_pixels_or_in_a_clear_error(tmp_path) -> None:
    tables = fuzz_images.fuzz(112, 0, tmp_path)
    assert sum(table["traceback"] + table["hang"] for table in tables.values()) == 0
    assert tables["pack"]["image"] + tables["pack"]["error"] == 112
    assert tables["extract"]["image"] > 10
