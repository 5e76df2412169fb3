"""From an image to what a network was trained on: `load_backbone(FILE).preprocess`.

It gives what extraction gave the network. The shorter side is resized and the centre cut out. Then
each channel is normalised by its mean and standard deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from deepclust.data.images.crops import CentreCrop, to_float
from deepclust.data.images.decode import decode
from deepclust.data.images.levels import DecodeError
from deepclust.errors import DataError
from deepclust.files import reading

LARGEST = 2**14  # pixels of the shorter side


@dataclass(frozen=True)
class Preprocess:
    """An image to a normalised crop, by the header of an export (`backbone.KEYS`).

    `net(net.preprocess(image)[None])` are the features of one image. An image is a path, the bytes
    of a file, a PIL image, or a uint8 tensor [3, h, w] of RGB. Images of more than 8 bits are read
    as they are stored: `data.levels` of a recipe is not in the header.
    """

    meta: dict[str, Any]

    def __call__(self, image: Any) -> Float32[Tensor, "3 s s"]:
        """Return the crop.

        Raises `DataError` for anything else than an image, and for a header that does not say how.
        """
        size = self.meta["image_size"]
        resize = self.meta.get("resize", size)
        mean, std = self._numbers("mean"), self._numbers("std")
        fits = type(resize) is int and size <= resize <= LARGEST
        if not fits or min(std) <= 0:
            raise DataError(f"the file's header has no use: resize {resize!r}, std {std}")
        crop = CentreCrop(size, resize)(_pixels(image))
        return to_float(crop[None], mean, std)[0]

    def _numbers(self, key: str) -> list[float]:
        """Return three numbers of the header, which may come from anybody."""
        value = self.meta.get(key)
        right = isinstance(value, list) and len(value) == 3
        if not right or not all(
            isinstance(one, (int, float)) and math.isfinite(one) for one in value or []
        ):
            raise DataError(
                f"the file's header does not say how images are normalised: its {key} is "
                f"{str(value)[:80]}. Export the run again."
            )
        return [float(one) for one in value or []]


def _pixels(image: Any) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of whatever stands for an image."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    if isinstance(image, (str, Path)):
        path = Path(image)
        with reading(path):
            return _decoded(path.read_bytes(), str(path))
    if isinstance(image, (bytes, memoryview)):
        return _decoded(image, "the image")
    is_bytes = isinstance(image, Tensor) and image.dtype == torch.uint8
    if is_bytes and image.ndim == 3 and image.shape[0] == 3 and image.numel():
        pixels: Tensor = image
        return pixels
    raise DataError(
        "preprocess takes a path, the bytes of an image file, a PIL image or a uint8 tensor "
        f"[3, h, w], not {_described(image)}"
    )


def _decoded(data: bytes | memoryview, name: str) -> UInt8[Tensor, "3 h w"]:
    try:
        return decode(data)
    except DecodeError as error:
        raise DataError(f"{name}: {error}") from error


def _described(image: Any) -> str:
    if isinstance(image, Tensor):
        return f"a {str(image.dtype).removeprefix('torch.')} tensor {list(image.shape)}"
    return type(image).__name__
