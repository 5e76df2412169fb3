"""The sources that `deepclust pack` reads: image folder, idx files, torchvision data set.

DIR                              class folders of images (torchvision's ImageFolder convention)
idx:DIR/train                    DIR/train-images-idx3-ubyte[.gz] and its labels (LeCun's format)
torchvision:CIFAR10:train@ROOT   a torchvision data set, downloaded to ROOT when absent
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from deepclust.data.images.decode import decode
from deepclust.errors import DataError

_STORED = {".jpg", ".jpeg", ".png", ".webp", ".ppm"}  # copied byte for byte
_CONVERTED = {".bmp", ".gif", ".pgm", ".tif", ".tiff"}  # become PNG
_UNSAFE = re.compile(r"[^\w/-]")
_PNG_LEVEL = 1  # zlib: 20 % faster than 6 on a 28 x 28 image, and 1 % larger


@dataclass(frozen=True)
class ImageSource:
    """Images to pack: `read(i)` returns image i's extension and bytes, label -1 means none."""

    labels: Int32[np.ndarray, " n"]
    class_names: list[str] | None
    read: Callable[[int], tuple[str, bytes]]
    keys: list[str] | None = None  # None: the packer numbers them


def open_source(source: str | Path) -> ImageSource:
    """Open a source in one of the forms above, or raise DataError."""
    text = os.fspath(source)
    if text.startswith("idx:"):
        return _idx(Path(text.removeprefix("idx:")))
    if text.startswith("torchvision:"):
        return _torchvision(text.removeprefix("torchvision:"))
    return _image_folder(Path(text))


def png(image: Image.Image) -> bytes:
    """Return the image as a lightly compressed PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _image_folder(folder: Path) -> ImageSource:
    """Return every image below `folder`, with the first folder of its path as its class."""
    files = sorted(_walk(folder))
    if not files:
        raise DataError(f"no images below {folder}. {_advice(folder)}")
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    number = {name: i for i, name in enumerate(names)}
    labels = [number.get(file.partition("/")[0], -1) if "/" in file else -1 for file in files]
    return ImageSource(
        np.array(labels, np.int32), names or None, _FileReader(folder, files), _keys(files)
    )


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative POSIX paths of the images below a folder, without hidden ones."""
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder} to pack. Give an image folder, 'idx:DIR/train', or "
            "'torchvision:NAME:SPLIT@ROOT'."
        )
    for place, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in _STORED | _CONVERTED:
                yield Path(place, name).relative_to(folder).as_posix()


def _unreadable(error: OSError) -> None:
    """Raise for a folder that cannot be listed, where `os.walk` would continue without it."""
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}.") from error


def _advice(folder: Path) -> str:
    idx = sorted(folder.glob("*-images-idx?-ubyte*"))
    if idx:
        return f"It holds idx files: pack 'idx:{folder / idx[0].name.partition('-images')[0]}'."
    return f"Images end in {', '.join(sorted(_STORED | _CONVERTED))}."


@dataclass(frozen=True)
class _FileReader:
    folder: Path
    files: list[str]

    def __call__(self, i: int) -> tuple[str, bytes]:
        path = self.folder / self.files[i]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}.") from error
        suffix = path.suffix.lower()
        if suffix in _STORED:
            return suffix[1:], data
        return "png", png(Image.fromarray(decode(data).permute(1, 2, 0).numpy()))


def _keys(files: list[str]) -> list[str]:
    """Return a readable key for each file: its relative path without the extension.

    All but letters, digits, "_", "-" and "/" becomes "_" (a dot would end the key). Files that
    become equal by this get "~" and a hash of their path.
    """
    plain = [_UNSAFE.sub("_", os.path.splitext(file)[0]).lstrip("_") or "image" for file in files]
    counts = Counter(plain)
    return [
        key if counts[key] == 1 else f"{key}~{_short_hash(file)}"
        for key, file in zip(plain, files, strict=True)
    ]


def _short_hash(file: str) -> str:
    return hashlib.blake2b(os.fsencode(file), digest_size=6).hexdigest()


def _idx(prefix: Path) -> ImageSource:
    images = _read_idx(prefix, "images")
    labels = _read_idx(prefix, "labels") if _find_idx(prefix, "labels") else None
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{prefix}: {len(images)} images, but {len(labels)} labels.")
    known = np.full(len(images), -1) if labels is None else labels
    return ImageSource(
        known.astype(np.int32), None, lambda i: ("png", png(Image.fromarray(images[i])))
    )


def _find_idx(prefix: Path, what: str) -> Path | None:
    pattern = f"{prefix.name}-{what}[-.]idx[0-9]-ubyte*"
    return next(iter(sorted(prefix.parent.glob(pattern))), None)


def _read_idx(prefix: Path, what: str) -> UInt8[np.ndarray, " *shape"]:
    """Read LeCun's format: 0, 0, 8 (unsigned bytes), number of dimensions, sizes, data.

    The sizes are big-endian int32.
    """
    path = _find_idx(prefix, what)
    if path is None:
        raise DataError(f"no {prefix}-{what}-idx*-ubyte[.gz]. Give 'idx:DIR/train' for DIR/train-*")
    try:
        data = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
        shape = np.frombuffer(data, ">i4", data[3], 4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of unsigned bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"cannot read {path}: {error}. Fetch it again.") from error


def _by_train(name: str) -> Callable[[str, str], Any]:
    return lambda root, split: _class(name)(root, train=_is_train(split), download=True)


def _by_split(name: str) -> Callable[[str, str], Any]:
    return lambda root, split: _class(name)(root, split=split, download=True)


def _class(name: str) -> Any:
    # It takes seconds to import, and is rarely needed.
    from torchvision import datasets

    return getattr(datasets, name)


def _is_train(split: str) -> bool:
    if split not in ("train", "test"):
        raise ValueError(f"its splits are train and test, not {split!r}")
    return split == "train"


# CIFAR's own files are pickles; torchvision checks their MD5 before it reads them.
_TORCHVISION: dict[str, Callable[[str, str], Any]] = {
    "CIFAR10": _by_train("CIFAR10"),
    "CIFAR100": _by_train("CIFAR100"),
    "FashionMNIST": _by_train("FashionMNIST"),
    "MNIST": _by_train("MNIST"),
    "STL10": _by_split("STL10"),
    "SVHN": _by_split("SVHN"),
}


def _torchvision(words: str) -> ImageSource:
    match = re.fullmatch(r"(\w+):(\w+)@(.+)", words)
    if match is None or match[1] not in _TORCHVISION:
        raise DataError(
            f"'torchvision:{words}' is not a data set. Write torchvision:NAME:SPLIT@FOLDER with "
            f"one of {', '.join(_TORCHVISION)}."
        )
    try:
        data = _TORCHVISION[match[1]](match[3], match[2])
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"torchvision's {match[1]}, {match[2]}: {error}") from error
    labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels)
    return ImageSource(
        labels.astype(np.int32),
        list(data.classes) if hasattr(data, "classes") else None,
        lambda i: ("png", png(data[i][0])),
    )
