"""What `net.preprocess` gives: the crop the network was trained on, from any form of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as transforms
from PIL import Image

from deepclust.errors import DataError
from deepclust.export.backbone import export_backbone, load_backbone
from deepclust.export.preprocess import Preprocess
from deepclust.models import build_backbone

META = {"image_size": 32, "resize": 40, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    Image.fromarray(draws.integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_it_is_torchvisions_resize_centre_crop_and_normalisation(photo: Path) -> None:
    usual = transforms.Compose(
        [
            transforms.ToImage(), transforms.Resize(40, antialias=True),
            transforms.CenterCrop(32), transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(META["mean"], META["std"]),
        ]
    )  # fmt: skip
    expected = usual(Image.open(photo))
    assert torch.allclose(Preprocess(META)(photo), expected, atol=1e-5)


def test_every_form_of_an_image_gives_the_same(photo: Path) -> None:
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)
    first, *others = (
        Preprocess(META)(image)
        for image in (photo, str(photo), photo.read_bytes(), Image.open(photo), pixels)
    )
    assert all(torch.equal(first, other) for other in others)


def test_a_loaded_network_has_it_and_takes_what_it_gives(tmp_path: Path, photo: Path) -> None:
    backbone = build_backbone("conv4", image_size=32, seed=0)
    assert backbone.preprocess is None
    meta = {name: META[name] for name in ("resize", "mean", "std")}
    export_backbone(backbone, tmp_path / "b.safetensors", "safetensors", meta=meta)
    net = load_backbone(tmp_path / "b.safetensors")
    assert net.preprocess is not None
    assert torch.equal(net.preprocess(photo), Preprocess(META)(photo))
    assert net(net.preprocess(photo)[None]).shape == (1, net.dim)


@pytest.mark.parametrize(
    "image", [None, 3, torch.zeros(3, 9, 9), torch.zeros(9, 9, 3, dtype=torch.uint8), b"text"]
)
def test_what_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(DataError):
        Preprocess(META)(image)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": None}, {"mean": [1, 2]}, {"mean": ["a", 0, 0]}, {"mean": [float("nan"), 0, 0]},
        {"std": [0, 1, 1]}, {"resize": 8}, {"resize": "40"}, {"resize": 10**9},
    ],
)  # fmt: skip
def test_a_header_that_does_not_say_how_is_refused(photo: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="header"):
        Preprocess({**META, **change})(photo)
