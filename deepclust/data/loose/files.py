"""The paths of an index's image files, by sample id: two columns that are mapped, not read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import UInt16

from deepclust.data.shards.check import load_column
from deepclust.data.shards.manifest import damaged

PATHS = "paths.bin"  # the paths, one after the other, relative to their roots
ENDS, SOURCES = "path_ends", "sources"  # columns: where each ends, and the number of its root


class File(NamedTuple):
    """An image file: the number of its root, and its path relative to that."""

    root: int
    path: str


class FilePaths(Sequence[Path]):
    """The full path of every sample's image file."""

    def __init__(self, folder: Path, roots: Sequence[Path], n: int) -> None:
        """Map the columns of the index in `folder`; `roots` are what paths are relative to."""
        self._roots = [os.fspath(root) for root in roots]
        self._ends = load_column(folder, ENDS, n)
        self._sources = load_column(folder, SOURCES, n) if len(roots) > 1 else None
        size = (folder / PATHS).stat().st_size if (folder / PATHS).is_file() else 0
        if n and (size == 0 or int(self._ends[-1]) != size):
            raise damaged(folder, f"{PATHS} is missing, or not as long as {ENDS}.npy says")
        self._names = np.memmap(folder / PATHS, np.uint8, "r")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        """Return one path, or a list of paths."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = range(len(self))[index]
        root, name = self.file(sample)
        return Path(self._roots[root], name)

    @property
    def roots(self) -> UInt16[np.ndarray, " n"]:
        """The number of every file's root."""
        return np.zeros(len(self), np.uint16) if self._sources is None else self._sources

    def root(self, sample: int) -> Path:
        """Return the folder that a sample's path is relative to."""
        return Path(self._roots[self.file(sample).root])

    def file(self, sample: int) -> File:
        """Return a sample's file."""
        start = int(self._ends[sample - 1]) if sample else 0
        name = os.fsdecode(self._names[start : int(self._ends[sample])].tobytes())
        return File(0 if self._sources is None else int(self._sources[sample]), name)


def write_paths(folder: Path, files: Iterable[File], *, several: bool) -> None:
    """Write the columns of an index."""
    ends, roots, end = [], [], 0
    with open(folder / PATHS, "wb") as blob:
        for file in files:
            end += blob.write(os.fsencode(file.path))
            ends.append(end)
            roots.append(file.root)
    np.save(folder / f"{ENDS}.npy", np.array(ends, np.uint64))
    if several:
        np.save(folder / f"{SOURCES}.npy", np.array(roots, np.uint16))
