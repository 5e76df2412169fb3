"""Several sources as one: their images follow each other, their classes meet by name.

Keys stay as they are in each source. Where two sources have a key in common, every key begins with
its source's name, so that no two samples have one key.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepclust.data.pack.classes import join_labels
from deepclust.data.pack.image_sources import ImageSource, SourceOptions, open_source
from deepclust.data.pack.names import plain_key, storable

Sources = str | Path | Sequence[str | Path]

PREFIXED = "sources: two have a key in common, so keys begin with the source's name"


def listed_sources(sources: Sources) -> list[str | Path]:
    """Return one or several sources as a list."""
    return [sources] if isinstance(sources, str | Path) else list(sources)


def open_sources(sources: Sources, options: SourceOptions) -> tuple[ImageSource, list[ImageSource]]:
    """Open sources as one, and return it and its parts, or raise DataError."""
    names = listed_sources(sources)
    parts = [open_source(source, options) for source in names]
    return (parts[0] if len(parts) == 1 else _joined(parts, names, options)), parts


def _joined(
    parts: list[ImageSource], names: Sequence[str | Path], options: SourceOptions
) -> ImageSource:
    starts = np.cumsum([0, *(len(part.labels.numbers) for part in parts)])

    def read(i: int) -> tuple[str, bytes]:
        number = int(np.searchsorted(starts, i, side="right")) - 1
        return parts[number].read(i - int(starts[number]))

    labels = join_labels([part.labels for part in parts], [str(name) for name in names])
    return ImageSource(labels, read, _keys(parts, names, options), options.packer)


def paths_of(parts: Sequence[ImageSource]) -> list[str | None]:
    """Return the path of every image's file, None where images are no files of their own."""
    paths: list[str | None] = []
    for part in parts:
        if part.folder is None or not part.files:
            paths += [None] * len(part.labels.numbers)
        else:
            paths += [storable(os.path.join(part.folder, file)) for file in part.files]
    return paths


def _keys(
    parts: list[ImageSource], names: Sequence[str | Path], options: SourceOptions
) -> list[str] | None:
    """Return all keys, or None where the packer numbers those of every source."""
    if all(part.keys is None for part in parts):
        return None
    own = [part.keys or [f"{i:09d}" for i in range(len(part.labels.numbers))] for part in parts]
    keys = [key for some in own for key in some]
    if len(set(keys)) == len(keys):
        return keys
    options.packer.notes.add(PREFIXED, ", ".join(prefixes := _prefixes(names)))
    return [f"{prefix}/{key}" for prefix, some in zip(prefixes, own, strict=True) for key in some]


def _prefixes(names: Sequence[str | Path]) -> list[str]:
    """Return a name for each source that no other has."""
    bases = [posixpath.basename(str(name).rstrip("/")) or "source" for name in names]
    plain = [plain_key(base) for base in bases]
    counts, seen, prefixes = Counter(plain), Counter[str](), []
    for name in plain:
        seen[name] += 1
        prefixes.append(name if counts[name] == 1 else f"{name}~{seen[name]}")
    return prefixes
