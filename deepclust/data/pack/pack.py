"""Pack images into shuffled WebDataset shards, and index them.

Shards are read in blocks from shared storage, so the shuffle at packing time makes the blocks
random. The same source, seed and arguments give the same bytes for any number of workers.
Order and shard borders are fixed before the first write, times and owners are constants.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image
from webdataset.writer import TarWriter

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.pack.image_sources import ImageSource, open_source, png
from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.errors import DataError, RecipeError
from deepclust.files import atomic_folder, write_json
from deepclust.world import generator

_JPEG_QUALITY = 92
_FEWEST_SHARDS = 16  # so that a small data set has blocks to shuffle and to divide over ranks
_LARGEST_SHARD = 10_000  # samples: about 1 GB of ImageNet
_LOSSLESS = ("png", "ppm")


@dataclass(frozen=True)
class _Work:
    """Everything that determines the bytes of the shards."""

    images: ImageSource
    order: Int64[np.ndarray, " n"]
    resize_short: int | None


def pack(
    source: str | Path,
    out: str | Path,
    *,
    shard_size: int | None = None,
    workers: int = 1,
    seed: int = 0,
    resize_short: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Index:
    """Write `out`/shard-000000.tar, ..., dataset.json and the index, and return the index.

    source        an image folder, "idx:DIR/train", "torchvision:NAME:SPLIT@ROOT"
    out           a folder that does not exist yet, or is empty
    shard_size    largest number of samples of a shard: 10,000 by default, or less to make 16 shards
    workers       number of threads (for resize_short), which changes no byte
    resize_short  images whose shorter side is longer are reduced to it: JPEG and WebP become JPEG
                  of quality 92, PNG and PPM become PNG
    class_names   overrides the names that the source has

    Other images keep their bytes. An image that cannot be decoded is packed as it is, and reported
    and excluded at extraction. Raises DataError for a source without images, and DiskError.
    """
    _check_positive(shard_size=shard_size, workers=workers, resize_short=resize_short)
    out = Path(out).absolute()
    _check_empty(out)
    images = open_source(source)
    order = generator(seed, "pack").permutation(len(images.labels)).astype(np.int64)
    work = _Work(images, order, resize_short)
    names = list(class_names) if class_names else images.class_names
    about = {"class_names": names, "source": str(source), "seed": seed}
    about |= {"resize_short": resize_short}

    def fill(folder: Path) -> None:
        _write_shards(work, folder, _shard_count(len(order), shard_size), workers)
        write_json(folder / "dataset.json", about)
        build_index(folder)

    atomic_folder(out, fill, before=lambda: None)
    return open_index(out)


def _check_positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name} must be at least 1, not {value}.")


def _check_empty(out: Path) -> None:
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise DataError(f"{out} exists already. Choose another folder, or delete it first.")


def _shard_count(n: int, shard_size: int | None) -> int:
    if shard_size is not None:
        return -(-n // shard_size)
    return min(n, max(_FEWEST_SHARDS, -(-n // _LARGEST_SHARD)))


def _write_shards(work: _Work, folder: Path, shards: int, workers: int) -> None:
    """Write shards whose numbers of samples differ by at most one."""
    borders = np.linspace(0, len(work.order), shards + 1).astype(np.int64)

    def write(shard: int) -> None:
        positions = range(borders[shard], borders[shard + 1])
        _write_shard(work, positions, folder / f"shard-{shard:06d}.tar")

    if workers == 1:
        for shard in range(shards):
            write(shard)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(write, range(shards)):
            pass


def _write_shard(work: _Work, positions: range, path: Path) -> None:
    with (
        open(path, "wb") as file,
        TarWriter(file, encoder=False, compress=False, mtime=0, format="PAX_FORMAT") as tar,
    ):
        for position in positions:
            tar.write(_sample(work, position))


def _sample(work: _Work, position: int) -> dict[str, str | bytes]:
    i = int(work.order[position])
    keys, label = work.images.keys, int(work.images.labels[i])
    extension, data = work.images.read(i)
    if work.resize_short is not None:
        extension, data = _reduce(extension, data, work.resize_short)
    sample: dict[str, str | bytes] = {
        "__key__": f"{position:09d}" if keys is None else keys[i],
        extension: data,
    }
    return sample if label < 0 else sample | {"cls": str(label).encode()}


def _reduce(extension: str, data: bytes, short: int) -> tuple[str, bytes]:
    """Reduce the image's shorter side to `short` (bicubic, antialiased), and encode it again."""
    try:
        image = decode(data)
    except DecodeError:
        return extension, data
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
