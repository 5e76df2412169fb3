"""Write shuffled images as shards of tar, with the same bytes for any number of workers.

Order and shard borders are fixed before the first write, times and owners are constants.
"""

from __future__ import annotations

import io
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image
from webdataset.writer import TarWriter

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.pack.image_sources import ImageSource
from deepclust.data.pack.order import shard_name
from deepclust.data.pack.stored import LeftOutError, Packer, png
from deepclust.data.shards.paths import Pair, write_paths
from deepclust.errors import DataError

SHOWN_EVERY_S = 5.0  # between two lines of progress
_JPEG_QUALITY = 92
_LOSSLESS = ("png", "ppm")


@dataclass(frozen=True)
class Work:
    """Everything that determines the bytes of the shards."""

    images: ImageSource
    order: Int64[np.ndarray, " n"]
    resize_short: int | None
    paths: Sequence[str | None] = ()  # of the files, where images are files of their own
    emit: Callable[[str], None] = lambda text: None  # how far it is, from time to time
    written: Written = field(default_factory=lambda: Written())

    def tell(self) -> None:
        """Count an image, and say how far it is where that was not said for a while."""
        if self.written.is_due():
            self.emit(f"packed {self.written.count:,} of {len(self.order):,} images")


class Written:
    """The number of images that all threads have written or left out."""

    def __init__(self) -> None:
        self.count, self._said, self._lock = 0, time.monotonic(), threading.Lock()

    def is_due(self) -> bool:
        """Count an image, and return whether the number should be said."""
        with self._lock:
            self.count += 1
            now = time.monotonic()
            if now - self._said < SHOWN_EVERY_S:
                return False
            self._said = now
            return True


def write_shards(
    work: Work, folder: Path, borders: Int64[np.ndarray, " shards_plus_1"], workers: int
) -> None:
    """Write shards whose samples lie between these borders of the order."""
    shards = len(borders) - 1

    def write(shard: int) -> list[Pair]:
        positions = range(borders[shard], borders[shard + 1])
        return _write_shard(work, positions, folder / shard_name(shard))

    # Pillow warns of damaged files, and threads cannot silence it without a trace in the filters.
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = list(pool.map(write, range(shards)) if workers > 1 else map(write, range(shards)))
    _drop_empty(folder, [len(one) for one in kept], work.images.packer)
    if any(work.paths):
        whole = [one for one in kept if one]
        write_paths(folder, {shard_name(number): one for number, one in enumerate(whole)})


def _drop_empty(folder: Path, counts: list[int], packer: Packer) -> None:
    """Delete shards of which all images were left out, and number the others again."""
    if not any(counts):
        raise DataError(f"no image could be packed: {', '.join(packer.left.lines())}.")
    for new, old in enumerate(np.flatnonzero(counts)):
        if new != old:
            (folder / shard_name(int(old))).rename(folder / shard_name(new))
    for empty in range(int(np.count_nonzero(counts)), len(counts)):
        (folder / shard_name(empty)).unlink(missing_ok=True)


def _write_shard(work: Work, positions: range, path: Path) -> list[Pair]:
    """Write a shard, and return the key and the file of each of its samples."""
    kept: list[Pair] = []
    with (
        open(path, "wb") as file,
        TarWriter(file, encoder=False, compress=False, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for position in positions:
            sample = _sample(work, position)
            work.tell()
            if sample is not None:
                tar.write(sample)
                origin = work.paths[int(work.order[position])] if work.paths else None
                kept.append((str(sample["__key__"]), origin))
    return kept


def _sample(work: Work, position: int) -> dict[str, str | bytes] | None:
    """Return what a shard holds of an image, or None for one that is left out."""
    i = int(work.order[position])
    keys, label = work.images.keys, int(work.images.labels.numbers[i])
    try:
        extension, data = work.images.read(i)
    except LeftOutError:
        return None
    key = f"{position:09d}" if keys is None else keys[i]
    if work.resize_short is not None:
        try:
            extension, data = _reduce(extension, data, work.resize_short)
        except DecodeError:
            work.images.packer.notes.add("that cannot be decoded: packed as it is", key)
    sample: dict[str, str | bytes] = {"__key__": key, extension: data}
    return sample if label < 0 else sample | {"cls": str(label).encode()}


def _reduce(extension: str, data: bytes, short: int) -> tuple[str, bytes]:
    """Reduce the image's shorter side to `short` (bicubic, antialiased), and encode it again."""
    image = decode(data)
    height, width = image.shape[1:]
    if min(height, width) <= short:
        return extension, data
    ratio = short / min(height, width)
    size = (max(short, round(width * ratio)), max(short, round(height * ratio)))
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    if extension in _LOSSLESS:
        return "png", png(small)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "jpg", buffer.getvalue()
