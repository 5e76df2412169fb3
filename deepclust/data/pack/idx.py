"""LeCun's idx files: DIR/train-images-idx3-ubyte[.gz] and their labels, QMNIST's too.

An idx file is 0, 0, the type, the number of dimensions, the sizes as big-endian int32, the values.
Images are unsigned bytes, [n, h, w] or [n, h, w, 3]. Labels are integers, [n], or [n, 8] of QMNIST,
whose first column is the class.
"""

from __future__ import annotations

import glob
import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from deepclust.errors import DataError

_HEADER = 4
_TYPES = {8: ">u1", 9: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DEPTHS = ((3, None), (4, 3), (4, 1))  # dimensions, and the length of the last one


class IdxFiles(NamedTuple):
    """Images uint8 [n, h, w] or [n, h, w, 3], and their labels, if there are any."""

    images: UInt8[np.ndarray, "n h w ..."]
    labels: Int32[np.ndarray, " n"] | None


def read_idx(prefix: Path) -> IdxFiles:
    """Read PREFIX-images-* and PREFIX-labels-*, or raise DataError."""
    images = _read(prefix, "images")
    if images.dtype != np.uint8 or not any(
        images.ndim == ndim and last in (None, images.shape[-1]) for ndim, last in _DEPTHS
    ):
        raise DataError(
            f"{prefix}: images of shape {images.shape} and type {images.dtype}, but images are "
            "unsigned bytes, [n, h, w] or [n, h, w, 3]."
        )
    if not images.size:
        raise DataError(f"{prefix}: 0 images. Fetch it again.")
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    return IdxFiles(images, _labels(prefix, len(images)))


def _labels(prefix: Path, n: int) -> Int32[np.ndarray, " n"] | None:
    if _find(prefix, "labels") is None:
        return None
    labels = _read(prefix, "labels")
    if labels.ndim == 2 and labels.shape[1]:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min(initial=0) < -1:
        raise DataError(f"{prefix}: labels of shape {labels.shape} and type {labels.dtype}.")
    if len(labels) != n:
        raise DataError(f"{prefix}: {n} images, but {len(labels)} labels.")
    return labels.astype(np.int32)


def _find(prefix: Path, what: str) -> Path | None:
    pattern = f"{glob.escape(prefix.name)}-{what}[-.]idx[0-9]-*"
    return next(iter(sorted(prefix.parent.glob(pattern))), None)


def _read(prefix: Path, what: str) -> np.ndarray:
    path = _find(prefix, what)
    if path is None:
        raise DataError(f"no {prefix}-{what}-idx*-ubyte[.gz]. Give 'idx:DIR/train' for DIR/train-*")
    try:
        data = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
        if data[:2] != b"\0\0" or data[2] not in _TYPES:
            raise ValueError("not an idx file")
        shape = [int(size) for size in np.frombuffer(data, ">i4", data[3], _HEADER)]
        if min(shape, default=-1) < 0:
            raise ValueError(f"its sizes are {shape}")
        start = _HEADER + 4 * len(shape)
        values = np.frombuffer(data, _TYPES[data[2]], offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error, MemoryError) as error:
        raise DataError(f"cannot read {path}: {error}. Fetch it again.") from error
    return values.astype(values.dtype.newbyteorder("="), copy=False)
