"""Pictures of the images of an index: read, decoded and made small, for a page or a server."""

from __future__ import annotations

import base64
import io
from typing import Self

import numpy as np
from PIL import Image

from deepclust.data.images.decode import decode
from deepclust.data.read.image_files import open_images
from deepclust.data.shards.index import Index

PATIENCE_S = 2.0  # for a file that cannot be read: a page is not worth a long wait


class Pictures:
    """Reads images of an index, whose files stay open while it is entered."""

    def __init__(self, index: Index, max_pixels: int) -> None:
        self._index, self._max_pixels = index, max_pixels

    def __enter__(self) -> Self:
        self._files = open_images(self._index, patience_s=PATIENCE_S)
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, sample_id: int) -> Image.Image:
        """Return an image in RGB and its own size, or raise `DecodeError`."""
        where = self._index.locate(np.array([sample_id]))
        data = self._files.read(*(int(column[0]) for column in where))
        return Image.fromarray(decode(data, self._max_pixels).permute(1, 2, 0).numpy())


def small(image: Image.Image, side: int, quality: int, kind: str = "JPEG") -> bytes:
    """Return the bytes of an image, no side of which is longer than `side` pixels."""
    image, buffer = image.copy(), io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def data_uri(image: Image.Image, side: int, quality: int, kind: str = "JPEG") -> str:
    """Return the same as a URI that holds the bytes, for a page that loads nothing."""
    text = base64.b64encode(small(image, side, quality, kind)).decode()
    return f"data:image/{kind.lower()};base64,{text}"
