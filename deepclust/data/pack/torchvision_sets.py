"""The data sets of torchvision that `pack` reads: torchvision:NAME:SPLIT@FOLDER.

They are downloaded to the folder when they are not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from deepclust.errors import DataError


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


def open_set(words: str) -> Any:
    """Open NAME:SPLIT@FOLDER, or raise DataError."""
    match = re.fullmatch(r"(\w+):(\w+)@(.+)", words)
    if match is None or match[1] not in _TORCHVISION:
        raise DataError(
            f"'torchvision:{words}' is not a data set. Write torchvision:NAME:SPLIT@FOLDER with "
            f"one of {', '.join(_TORCHVISION)}."
        )
    try:
        return _TORCHVISION[match[1]](match[3], match[2])
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"torchvision's {match[1]}, {match[2]}: {error}") from error
