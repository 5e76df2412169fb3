"""Every stored form becomes upright uint8 RGB; Pillow is the slow reference."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor

from deepclust.data.images import decode as decoding
from deepclust.data.images import headers, png_check
from deepclust.data.images.decode import DecodeError, decode
from deepclust.errors import DataError
from tests.images import draw, encode

PICTURE = Image.fromarray(draw(3, 40, 50).permute(1, 2, 0).numpy())
LOSSY = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
STORED = [
    *[("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")],
    *[("JPEG", mode) for mode in ("RGB", "L", "CMYK")],
    *[("WEBP", mode) for mode in ("RGB", "RGBA")],
    *[("PPM", mode) for mode in ("RGB", "L")],
    *[("GIF", "P"), ("BMP", "RGB"), ("TIFF", "CMYK")],
]
ORIENTATION = 0x0112


def stored(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **{**LOSSY.get(format, {}), **options})
    return buffer.getvalue()


def by_pillow(data: bytes) -> Tensor:
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def png_header(width: int, height: int) -> bytes:
    """A valid PNG as far as its header: what a decompression bomb begins with."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(("format", "mode"), STORED)
def test_every_format_and_mode_decodes_as_pillow_does(format: str, mode: str) -> None:
    data = stored(PICTURE.convert(mode), format)
    image = decode(data)
    assert image.shape == (3, 40, 50)
    assert image.dtype == torch.uint8
    assert (image.int() - by_pillow(data).int()).abs().max() <= 2


def test_large_pngs_decode_as_small_ones_do() -> None:
    image = draw(4, 90, 120)
    assert len(encode(image, "png")) > 8192
    assert torch.equal(decode(encode(image, "png")), image)


def test_transparency_is_dropped_and_not_blended() -> None:
    image = PICTURE.copy()
    image.putalpha(0)
    assert torch.equal(decode(stored(image, "PNG")), by_pillow(stored(PICTURE, "PNG")))


@pytest.mark.parametrize("format", ["PNG", "PPM", "TIFF"])
def test_16_bits_are_rounded_to_8(format: str) -> None:
    values = np.arange(0, 65536, 7, dtype=np.uint16)[: 90 * 100].reshape(90, 100)
    image = decode(stored(Image.fromarray(values), format))
    assert torch.equal(image[0], torch.from_numpy(np.rint(values / 257).astype(np.uint8)))
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    upright = decode(stored(PICTURE, format)).rot90(turns, (1, 2))
    image = decode(stored(PICTURE, format, exif=exif.tobytes()))
    assert (image.int() - upright.int()).abs().float().mean() < 3


def test_a_ppm_header_may_hold_comments_and_a_small_largest_value() -> None:
    image = decode(b"P6 # a comment\n2 # width\n1\n15\n" + bytes([0, 15, 3, 1, 2, 30]))
    assert image.flatten().tolist() == [0, 17, 255, 34, 51, 255]


def test_a_memoryview_is_as_good_as_bytes_and_is_not_changed() -> None:
    data = encode(draw(0), "png")
    buffer = bytearray(b"before" + data + b"after")
    assert torch.equal(decode(memoryview(buffer)[6:-5]), decode(data))
    assert bytes(buffer) == b"before" + data + b"after"


def test_decoding_twice_gives_the_same_pixels() -> None:
    data = encode(draw(1, 64, 64), "jpg", quality=80)
    assert torch.equal(decode(data), decode(data))


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "ppm", "gif"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_cut_off_image_is_an_error_with_the_reason(format: str, share: float) -> None:
    data = encode(draw(2), format)
    with pytest.raises(DecodeError, match=r"truncated|damaged|0 bytes"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"hello, world", b"\0" * 100, b"P6 not numbers", b"RIFFxxxxWEBP"])
def test_a_file_that_is_not_an_image_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"damaged|not an image"):
        decode(data)


def test_the_mpo_of_a_camera_with_two_lenses_is_its_first_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = stored(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    native = decode(data)
    monkeypatch.setattr(decoding, "_FORMATS", {})  # all is left to Pillow
    assert (decode(data).int() - native.int()).abs().max() <= 2


def test_an_eps_is_refused_without_starting_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored(PICTURE, "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"  # which Pillow alone would take
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    with pytest.raises(DecodeError, match="not an image"):
        decode(data)
    assert not started


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "ppm"])
def test_damaged_bytes_raise_decode_errors_and_nothing_worse(format: str) -> None:
    random, refused = np.random.default_rng(0), 0
    whole = encode(draw(5, 16, 16), format)
    for _ in range(300):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(256)
        try:
            assert decode(bytes(data), max_pixels=1 << 20).dtype == torch.uint8
        except DecodeError:
            refused += 1
    assert refused > 10


def with_pixel_data(pixels: bytes) -> bytes:
    """The 16 x 16 RGB PNG with other pixel data; all its checksums are right."""
    body = b"IDAT" + pixels
    chunk = struct.pack(">I", len(pixels)) + body + struct.pack(">I", zlib.crc32(body))
    return png_header(16, 16) + chunk + b"\0\0\0\0IEND\xae\x42\x60\x82"


ROWS = b"".join(bytes([1, *range(48)]) for _ in range(16))
UNSOUND = {
    "a filter that does not exist": zlib.compress(ROWS[:49] + b"\x07" + ROWS[50:]),
    "too few rows": zlib.compress(ROWS[:-1]),
    "a wrong check value": zlib.compress(ROWS)[:-1] + b"\0",
    "an open stream": zlib.compress(ROWS)[:-6],
    "no stream": b"pixels",
}


def test_a_sound_png_goes_to_torchvision() -> None:
    data = with_pixel_data(zlib.compress(ROWS))
    assert png_check.is_sound(data)
    assert torch.equal(decode(data), by_pillow(data))


@pytest.mark.parametrize("fault", UNSOUND)
def test_a_png_that_would_kill_torchvision_does_not_reach_it(fault: str) -> None:
    data = with_pixel_data(UNSOUND[fault])
    assert not png_check.is_sound(data)
    with contextlib.suppress(DecodeError):  # Pillow forgives some of them
        assert decode(data).shape == (3, 16, 16)


def test_an_interlaced_png_is_left_to_pillow() -> None:
    data = bytearray(with_pixel_data(zlib.compress(ROWS)))
    data[28] = 1
    assert not png_check.is_sound(bytes(data))


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "ppm", "gif"])
def test_more_pixels_than_the_limit_are_refused(format: str) -> None:
    data = encode(draw(0, 20, 30), format)
    assert decode(data, max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(DecodeError, match="30 x 20 pixels, more than the limit of 599"):
        decode(data, max_pixels=599)


def test_a_decompression_bomb_is_refused_by_its_header_before_decoding() -> None:
    with pytest.raises(DecodeError, match="65000 x 65000 pixels"):
        decode(png_header(65000, 65000))


@pytest.mark.parametrize("options", [{"quality": 90}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_the_three_webp_headers_give_their_size(options: dict) -> None:
    assert headers.webp_size(stored(PICTURE, "WEBP", **options)) == (40, 50)


@pytest.mark.parametrize("options", [{"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 9000}])
def test_jpeg_size_is_found_behind_other_segments(options: dict) -> None:
    assert headers.jpeg_size(stored(PICTURE, "JPEG", **options)) == (40, 50)


def test_a_torchvision_without_its_decoders_is_named_before_the_slow_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert decoding.notes() == []
    monkeypatch.setattr(decoding, "NATIVE", ("decode_jpeg", "decode_of_tomorrow"))
    (note,) = decoding.notes()
    assert "has no decode_of_tomorrow here, so Pillow decodes" in note
