"""A large JPEG is decoded as small as its crops allow, and nothing else is."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepclust import open_index
from deepclust.data.images import reduced
from deepclust.data.images.crops import CentreCrop, Crop, RandomResizedCrop
from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.images.device_crops import cut_of
from deepclust.data.images.headers import Size
from deepclust.data.images.reduced import LARGE, decode_for, scale_for
from deepclust.data.read.dataset import Batches, Request
from tests.images import write_tar

HEIGHT, WIDTH = 901, 1203
THUMB = [(CentreCrop(96, 110), None)]


def smooth(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """An image without high frequencies, of which a smaller one says as much."""
    y, x = np.mgrid[:height, :width]
    waves = (np.sin(y / 60), np.cos(x / 80), np.sin((x + y) / 70))
    return np.stack([np.rint(127 + 120 * wave) for wave in waves], 2).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


PHOTO = jpeg(smooth())


def test_a_large_jpeg_is_decoded_at_the_scale_that_its_crops_allow() -> None:
    for size, scale in ((96, 8), (200, 4), (400, 1)):
        image = decode_for([(CentreCrop(size, size), None)], PHOTO, 10**8, "reduced")
        assert image.shape == (3, -(-HEIGHT // scale), -(-WIDTH // scale))


def test_its_pixels_are_the_means_of_blocks_of_the_whole_image() -> None:
    whole = decode(PHOTO).float()
    for size, scale in ((96, 8), (200, 4)):
        image = decode_for([(CentreCrop(size, size), None)], PHOTO, 10**8, "reduced")
        means = torch.nn.functional.avg_pool2d(whole, scale, ceil_mode=True)
        apart = (image.float() - means).abs()[:, :-1, :-1]  # the last blocks are not whole
        assert apart.mean() < 0.75
        assert apart.max() <= 4


def test_one_crop_that_needs_all_pixels_has_them_for_all_crops() -> None:
    crops = [*THUMB, (CentreCrop(900, 900), None)]
    assert torch.equal(decode_for(crops, PHOTO, 10**8, "reduced"), decode(PHOTO))


def test_other_images_and_other_recipes_have_the_pixels_as_they_are() -> None:
    progressive, upside_down = jpeg(smooth(), progressive=True), Image.Exif()
    upside_down[0x0112] = 3
    others = (jpeg(smooth(300, 400)), progressive, jpeg(smooth(), exif=upside_down.tobytes()))
    for data in others:
        assert torch.equal(decode_for(THUMB, data, 10**8, "reduced"), decode(data))
    for decoder in ("cpu", "gpu"):
        assert torch.equal(decode_for(THUMB, PHOTO, 10**8, decoder), decode(PHOTO))


def test_grey_images_are_repeated() -> None:
    image = decode_for(THUMB, jpeg(smooth()[:, :, 0]), 10**8, "reduced")
    assert image.shape[1] < HEIGHT
    assert torch.equal(image[0], image[2])


def test_what_pillow_refuses_has_the_error_of_a_whole_image(monkeypatch) -> None:
    monkeypatch.setattr(reduced, "jpeg_at", lambda *_: None)
    assert torch.equal(decode_for(THUMB, PHOTO, 10**8, "reduced"), decode(PHOTO))
    with pytest.raises(DecodeError):
        decode_for(THUMB, PHOTO[:40] + PHOTO[-2:], 10**8, "reduced")


def test_the_limit_of_pixels_is_that_of_the_whole_image() -> None:
    with pytest.raises(DecodeError, match="1203 x 901 pixels"):
        decode_for(THUMB, PHOTO, LARGE, "reduced")


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 300), st.integers(0, 10**6))
def test_no_crop_is_enlarged_by_more_than_a_pixel_of_rounding(
    height: int, width: int, side: int, position: int
) -> None:
    view = RandomResizedCrop(side)
    draw = view.draws(0, np.array([position]))[0]
    scale = scale_for(Size(height, width), [cut_of(view, height, width, draw)])
    small = cut_of(view, -(-height // scale), -(-width // scale), draw).box[2:]
    assert scale == 1 or min(small) >= side - 1


def test_a_batch_has_the_crops_of_images_as_small_as_their_own_crops_allow(tmp_path: Path) -> None:
    names = [f"{i:07d}.jpg" for i in range(3)]
    files = [jpeg(np.roll(smooth(), 100 * i, 1)) for i in range(3)]
    write_tar(tmp_path / "0.tar", list(zip(names, files, strict=True)))
    views = RandomResizedCrop(64, (0.3, 1.0)), RandomResizedCrop(32, (0.1, 0.3))
    ids = np.arange(3)
    asked = Request(ids, ids, 5, tuple(map(Crop, views)))
    loaded = Batches(open_index(tmp_path), decoder="reduced")[asked]
    draws = [view.draws(key, ids) for view, key in zip(views, asked.keys, strict=True)]
    for row, file in enumerate(files):
        crops = [(view, drawn[row]) for view, drawn in zip(views, draws, strict=True)]
        image = decode_for(crops, file, 10**8, "reduced")
        assert image.shape[1] < HEIGHT
        for (view, draw), made in zip(crops, loaded.images, strict=True):
            assert torch.equal(made[row], view(image, draw))
