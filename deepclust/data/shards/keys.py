"""The keys of an index: keys.parquet, with a row group for each shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from deepclust.data.shards.manifest import Manifest, damaged

KEYS = "keys.parquet"


class Keys(Sequence[str]):
    """The samples' keys by sample id, read from keys.parquet a shard at a time."""

    def __init__(self, folder: Path, bases: Int64[np.ndarray, " s1"]) -> None:
        """Remember the index's folder and `bases`, the shards' first sample ids and n."""
        self._folder, self._bases = folder, bases
        self._loaded: tuple[int, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._bases[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one key, or a list of keys."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = range(len(self))[index]
        shard = int(np.searchsorted(self._bases, sample, side="right")) - 1
        return str(self._shard(shard)[sample - int(self._bases[shard])].as_py())

    def __iter__(self) -> Iterator[str]:
        """Yield all keys in the order of sample ids."""
        for keys in self.by_shard():
            yield from keys.to_pylist()

    def by_shard(self) -> Iterator[pa.Array]:
        """Yield the keys of one shard after the other, as text."""
        for keys in read_keys(self._folder, range(len(self._bases) - 1)):
            yield keys.combine_chunks()

    def of(self, sample_ids: Int64[np.ndarray, " m"]) -> list[str]:
        """Return the keys of samples in any order; each shard that they are in is read once."""
        found = np.empty(len(sample_ids), object)
        shards = np.searchsorted(self._bases, sample_ids, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            rows = np.asarray(sample_ids)[here] - int(self._bases[shard])
            found[here] = self._shard(shard).take(pa.array(rows)).to_pylist()
        return found.tolist()

    def _shard(self, shard: int) -> pa.ChunkedArray:
        if self._loaded is None or self._loaded[0] != shard:
            self._loaded = shard, next(read_keys(self._folder, [shard]))
        return self._loaded[1]


def read_keys(folder: Path, shards: Iterable[int]) -> Iterator[pa.ChunkedArray]:
    """Yield the keys of each of these shards, as text, from a file that is opened once."""
    try:
        with pq.ParquetFile(folder / KEYS) as file:
            for shard in shards:
                keys = file.read_row_group(shard, ["key"])["key"]
                keys.validate(full=True)  # that it is UTF-8, too
                yield keys
    except (OSError, ValueError, IndexError, MemoryError, pa.ArrowException) as error:
        raise damaged(folder, f"{KEYS} cannot be read") from error


def check_keys(folder: Path, manifest: Manifest) -> None:
    """Raise DataError unless keys.parquet has a row group of the right length for every shard."""
    try:
        with pq.ParquetFile(folder / KEYS) as file:
            about = file.metadata
            rows = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
            right = file.schema_arrow.names == ["key"]
    except (OSError, ValueError, pa.ArrowException, MemoryError) as error:
        raise damaged(folder, f"{KEYS} cannot be read") from error
    if not right or rows != [entry["samples"] for entry in manifest["shards"]]:
        raise damaged(folder, f"{KEYS} has other rows than the manifest")
