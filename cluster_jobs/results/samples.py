"""The samples of an index as tables have them: shard by shard, with keys and paths of files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deepclust.data.loose.index import FileIndex
from deepclust.data.pack.names import storable
from deepclust.data.shards.index import Index
from deepclust.data.shards.paths import have_paths, read_paths

UNREAD = "it cannot be read"
PATH = pa.field("path", pa.string())


@dataclass(frozen=True)
class Part:
    """One shard's samples, whose ids are first to last - 1; paths are None where none is known."""

    shard: str
    first: int
    last: int
    keys: pa.Array
    paths: pa.Array | None

    @property
    def sample_ids(self) -> np.ndarray:
        """The ids of the samples."""
        return np.arange(self.first, self.last)

    def reasons(self, known: dict[int, str], absent: np.ndarray, lost: str) -> pa.Array:
        """Return why samples have no cluster or row, null for all others."""
        if not absent.any():
            return pa.nulls(len(absent), pa.string())
        why = np.full(len(absent), None, dtype=object)
        for place in np.flatnonzero(absent):
            why[place] = known.get(self.first + int(place), lost)
        return pa.array(why, pa.string())


def has_paths(index: Index) -> bool:
    """Return whether the files are known that samples of an index are, or were made of."""
    return isinstance(index, FileIndex) or have_paths(index.shards)


def parts_of(index: Index) -> Iterator[Part]:
    """Yield the samples of an index, shard by shard."""
    known = has_paths(index)
    for shard, (name, keys) in enumerate(zip(index.names, index.keys.by_shard(), strict=True)):
        first, last = index.bases[shard : shard + 2].tolist()
        yield Part(name, first, last, keys, _paths(index, shard, keys) if known else None)


def _paths(index: Index, shard: int, keys: pa.Array) -> pa.Array:
    if not isinstance(index, FileIndex):
        return read_paths(index.shards[shard], keys)
    first, last = index.bases[shard : shard + 2].tolist()
    return pa.array([storable(str(path)) for path in index.paths[first:last]], pa.string())
