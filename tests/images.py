"""Tiny deterministic colour images, and folders of shards made of them, for every test.

Written with `tarfile` and Pillow alone, so that our own packer and decoder are not their own
reference. The class of an image decides its hue, so a clustering has something to find.
"""

from __future__ import annotations

import colorsys
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GOLDEN = 0.618


def draw(seed: int, h: int = 32, w: int = 32, label: int | None = None) -> Tensor:
    """An image uint8 [3, h, w]: a bright disc of the label's hue on a dark gradient, with noise."""
    random = np.random.default_rng(seed)
    hue = (seed if label is None else label) * GOLDEN % 1.0
    disc = np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.9)) * 255
    y, x = np.mgrid[:h, :w] / max(h, w)
    inside = (y - random.uniform(0.3, 0.7)) ** 2 + (x - random.uniform(0.3, 0.7)) ** 2 < 0.08
    image = np.where(inside[..., None], disc, 60 * (x + y)[..., None])
    image += random.uniform(-12, 12, (h, w, 3))
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def encode(image: Tensor, format: str = "png", **options: object) -> bytes:
    """The bytes of an image uint8 [3, h, w] as "png", "jpg", "webp" or "ppm"."""
    buffer = io.BytesIO()
    name = {"jpg": "JPEG", "jpeg": "JPEG"}.get(format, format.upper())
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, name, **options)
    return buffer.getvalue()


def write_tar(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """A plain tar with these members in this order; times and owners are fixed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_shards(
    folder: Path,
    n: int = 64,
    shards: int = 4,
    classes: int = 4,
    size: int = 32,
    format: str = "png",
    labels: bool = True,
) -> Path:
    """Write n images into shard-000000.tar, ... and return the folder.

    Sample i has the key "000000i", the class i % classes, and is `draw(i, size, size, class)`; its
    shard is i // ceil(n / shards). `labels=False` leaves the .cls members and dataset.json out.
    """
    folder = Path(folder)
    samples: list[list[tuple[str, bytes]]] = []
    for i in range(n):
        label = i % classes
        picture = (f"{i:07d}.{format}", encode(draw(i, size, size, label), format))
        samples.append([(f"{i:07d}.cls", str(label).encode()), picture] if labels else [picture])
    per_shard = -(-n // shards)
    for shard in range(shards):
        own = samples[shard * per_shard : (shard + 1) * per_shard]
        write_tar(
            folder / f"shard-{shard:06d}.tar", [member for sample in own for member in sample]
        )
    if labels:
        names = [f"class {label}" for label in range(classes)]
        (folder / "dataset.json").write_text(json.dumps({"class_names": names}))
    return folder


def make_image_folder(
    folder: Path, n: int = 12, classes: int = 3, size: int = 32, format: str = "png"
) -> Path:
    """Write n images in the ImageFolder convention: folder/class-0/0000.png, ..."""
    folder = Path(folder)
    for i in range(n):
        label = i % classes
        path = folder / f"class-{label}" / f"{i:04d}.{format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(i, size, size, label), format))
    return folder
