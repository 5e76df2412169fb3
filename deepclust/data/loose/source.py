"""Folders and lists of image files, opened as `pack` opens them, scanned as its shards are.

The classes, keys, order and shards are those of `deepclust pack PLACE... OUT` with its default seed
and shard size. Of each file the beginning is read, and all of it where shards would hold a PNG.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from deepclust.data.loose.files import File
from deepclust.data.loose.find import Place
from deepclust.data.loose.layout import Layout, Member
from deepclust.data.pack.image_sources import ImageSource, SourceOptions
from deepclust.data.pack.order import shard_borders, shard_name, shuffled
from deepclust.data.pack.several import open_sources
from deepclust.data.pack.stored import LeftOutError
from deepclust.data.shards.fields import AUTO, FOLDER, NONE
from deepclust.data.shards.scan import Scan
from deepclust.errors import DataError, RecipeError

RULES = {AUTO: "", NONE: NONE, FOLDER: "last", "first": "first", "last": "last", "full": "full"}
_THREADS = 8  # that wait for the storage together
_TOGETHER = 256  # files that a thread looks at


def roots_of(places: Sequence[Place]) -> list[Path]:
    """Return what the paths of each place are relative to."""
    full = [place.path.absolute() for place in places]
    return [path if path.is_dir() else path.parent for path in full]


def check_labels(labels: str) -> None:
    """Raise RecipeError for a `data.labels` that image files do not have."""
    if labels not in RULES and not os.path.isfile(labels):
        raise RecipeError(
            f"data.labels={labels}: for image files it is auto, none, first, last or full (the "
            "folder that is the class), or a file with a class name a line."
        )


@dataclass(frozen=True)
class Opened:
    """Image files with their labels, before any is looked at."""

    places: Sequence[Place]
    images: ImageSource
    parts: list[ImageSource]

    @property
    def digest(self) -> str:
        """The hash of all paths and labels."""
        digest = hashlib.blake2b(repr(self.images.labels.names).encode(), digest_size=16)
        digest.update(self.images.labels.numbers.tobytes())
        for part in self.parts:
            digest.update(os.fsencode("\0".join(part.files)))
        return digest.hexdigest()

    @property
    def watched(self) -> list[tuple[int, str]]:
        """The folders that were listed, each with the number of its place."""
        return [(i, folder) for i, part in enumerate(self.parts) for folder in part.walked]


def open_places(places: Sequence[Place], labels: str) -> Opened:
    """Open folders and lists with the labels that `data.labels` asks for."""
    check_labels(labels)
    options = SourceOptions(RULES.get(labels, labels), in_place=True)
    images, parts = open_sources([place.path for place in places], options)
    return Opened(places, images, parts)


def scan_files(opened: Opened) -> Iterator[tuple[Scan, list[File]]]:
    """Yield the scan of each shard that `pack` would write, and the files of its samples.

    Raises DataError if no image is left.
    """
    order = shuffled(len(opened.images.labels.numbers))
    borders, shards = shard_borders(len(order)), 0
    look = _Look(opened)
    with ThreadPoolExecutor(_THREADS) as pool:
        for first, last in itertools.pairwise(borders.tolist()):
            pieces = np.array_split(order[first:last], -(-(last - first) // _TOGETHER))
            layout, files = Layout(), []
            for rows in pool.map(look.at, pieces):
                for member, file in rows:
                    layout.add(member)
                    files.append(file)
            if files:
                yield layout.scan(shard_name(shards)), files
                shards += 1
    if not shards:
        left = ", ".join(opened.images.packer.left.lines())
        raise DataError(f"none of the images of {opened.places[0].path} can be read: {left}.")


class _Look:
    """A look at image files, by their numbers in the source."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        counts = [len(part.files) for part in opened.parts]
        self.starts = np.cumsum([0, *counts])

    def at(self, numbers: Int64[np.ndarray, " m"]) -> list[tuple[Member, File]]:
        """Return what a shard would hold of these files, without those that are left out."""
        return [row for i in numbers.tolist() if (row := self._row(i)) is not None]

    def _row(self, i: int) -> tuple[Member, File] | None:
        images = self.opened.images
        root = int(np.searchsorted(self.starts, i, side="right")) - 1
        part = self.opened.parts[root]
        file = part.files[i - int(self.starts[root])]
        assert part.folder is not None
        assert images.keys is not None
        try:
            extension, size = images.packer.stored(file, part.folder / file)
        except LeftOutError:
            return None
        label = int(images.labels.numbers[i])
        return Member(images.keys[i], extension, size, label), File(root, file)
