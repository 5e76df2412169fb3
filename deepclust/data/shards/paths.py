"""The files that `deepclust pack` has made samples of: paths.parquet beside the shards.

It has a row group for each shard, with the columns shard, key and path. A path is that of the
source as it was given, joined with the file's place in it. No fingerprint has it. Shards of other
origin have no such file, and their samples no path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepclust.data.shards.url import Source
from deepclust.errors import DataError

FILE = "paths.parquet"
SCHEMA = pa.schema({"shard": pa.string(), "key": pa.string(), "path": pa.string()})
Pair: TypeAlias = tuple[str, str | None]  # the key of a sample, and its file


def write_paths(folder: Path, shards: dict[str, list[Pair]]) -> None:
    """Write the (key, path) pairs of the samples of each shard, in their order."""
    with pq.ParquetWriter(folder / FILE, SCHEMA) as writer:
        for shard, pairs in shards.items():
            keys, paths = (list(column) for column in zip(*pairs, strict=True))
            columns = [
                pa.repeat(shard, len(keys)),
                *(pa.array(c, pa.string()) for c in (keys, paths)),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))


def have_paths(shards: Sequence[Source]) -> bool:
    """Return whether paths of files are known for any of these shards."""
    folders = {shard.parent for shard in shards if isinstance(shard, Path)}
    return any((folder / FILE).is_file() for folder in folders)


def read_paths(shard: Source, keys: pa.Array) -> pa.Array:
    """Return the paths of a shard's samples by their keys, null where none is known.

    Raises `DataError` for a paths.parquet that cannot be read.
    """
    if not isinstance(shard, Path) or not (shard.parent / FILE).is_file():
        return pa.nulls(len(keys), pa.string())
    try:
        group = _groups(shard.parent / FILE).get(shard.name)
        if group is None:
            return pa.nulls(len(keys), pa.string())
        with pq.ParquetFile(shard.parent / FILE) as file:
            table = file.read_row_group(group, ["key", "path"])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{shard.parent / FILE} cannot be read ({error}). Copy it back, or delete it"
        ) from error
    places = pc.index_in(keys, value_set=table["key"].combine_chunks())
    return table["path"].combine_chunks().take(places)


@lru_cache(maxsize=16)
def _groups(file: Path) -> dict[str, int]:
    """Return the row group of each shard."""
    with pq.ParquetFile(file) as table:
        count = table.metadata.num_row_groups
        first = [table.read_row_group(i, ["shard"])["shard"] for i in range(count)]
    return {str(column[0]): i for i, column in enumerate(first) if len(column)}
