"""The index of a set of shards: where every sample's image begins, and who the sample is.

A sample id is its shard's base + its position in the shard; the key is only a name. All reads go
through the index, so a bad image keeps its id and shifts nobody's label. On disk an index is a
folder: manifest.json, memory-mapped offsets.npy [n] uint64, sizes.npy [n] uint32, labels.npy [n]
int32 (where there are labels), and keys.parquet with one row group a shard; some 25 bytes a sample.

The fingerprint is a blake2b over the shards' base names and sizes and every member's name, offset
and size. It knows no path and no time, so a copy of the shards has the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, Integer, UInt32, UInt64

from deepclust.data.shards import index_build
from deepclust.data.shards.file_lock import held
from deepclust.data.shards.find import common_folder, expand
from deepclust.data.shards.remote import fetch
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError, RecipeError


class Location(NamedTuple):
    """Where images are: shard ordinals, byte offsets and byte sizes, each int64 [m]."""

    shard: Int64[np.ndarray, " m"]
    offset: Int64[np.ndarray, " m"]
    size: Int64[np.ndarray, " m"]


class Keys(Sequence[str]):
    """The samples' keys by sample id, read from keys.parquet a shard at a time."""

    def __init__(self, path: Path, bases: Int64[np.ndarray, " s1"]) -> None:
        """Read nothing yet; `bases` are the shards' first sample ids and n."""
        self._path, self._bases = path, bases
        self._loaded: tuple[int, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._bases[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One key, or a list of keys."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = range(len(self))[index]
        shard = int(np.searchsorted(self._bases, sample, side="right")) - 1
        return str(self._shard(shard)[sample - int(self._bases[shard])].as_py())

    def __iter__(self) -> Iterator[str]:
        """All keys in the order of sample ids."""
        for shard in range(len(self._bases) - 1):
            yield from self._shard(shard).to_pylist()

    def _shard(self, shard: int) -> pa.ChunkedArray:
        if self._loaded is None or self._loaded[0] != shard:
            with pq.ParquetFile(self._path) as file:
                self._loaded = shard, file.read_row_group(shard)["key"]
        return self._loaded[1]


class Index:
    """An opened index: memory-mapped columns by sample id. Cheap to open and to pickle."""

    def __init__(self, folder: Path, shards: list[Source]) -> None:
        """Map the columns of the index in `folder`; the shards are not looked at."""
        self.folder, self.shards = folder, shards
        manifest = index_build.read_manifest(folder)
        self.fingerprint: str = manifest["fingerprint"]
        self.excluded = {int(i): reason for i, reason in manifest["excluded"].items()}
        counts = [shard["samples"] for shard in manifest["shards"]]
        self.lengths: list[int] = [shard["size"] for shard in manifest["shards"]]  # bytes
        self.bases: Int64[np.ndarray, " s1"] = np.cumsum([0, *counts], dtype=np.int64)
        self.offsets: UInt64[np.ndarray, " n"] = self._column("offsets")
        self.sizes: UInt32[np.ndarray, " n"] = self._column("sizes")
        self.labels: Int32[np.ndarray, " n"] | None = None
        if manifest["labelled"]:
            self.labels = self._column("labels")

    def __len__(self) -> int:
        """The number of samples, the excluded ones too."""
        return int(self.bases[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers open the files again instead of copying the columns."""
        return Index, (self.folder, self.shards)

    @cached_property
    def keys(self) -> Keys:
        """The samples' keys; read when first asked for."""
        return Keys(self.folder / "keys.parquet", self.bases)

    @cached_property
    def class_names(self) -> list[str] | None:
        """The names of the labels, from the dataset.json beside the shards, if there is one."""
        path = common_folder(self.shards) / "dataset.json"
        names: list[str] | None = json.loads(fetch(path) or b"{}").get("class_names")
        if names is not None and self.labels is not None and self.labels.max() >= len(names):
            raise DataError(
                f"{path} names {len(names)} classes, but labels reach {self.labels.max()}. "
                "Correct its class_names, or delete it."
            )
        return names

    def locate(self, ids: Integer[np.ndarray, " m"]) -> Location:
        """Where the images of these samples are. An excluded sample has size 0."""
        ids = np.asarray(ids, np.int64)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self)), "no such sample id"
        shard = np.searchsorted(self.bases, ids, side="right") - 1
        return Location(shard, self.offsets[ids].astype(np.int64), self.sizes[ids].astype(np.int64))

    def where(self, sample: int) -> str:
        """A sample's shard, key and offset, for messages."""
        shard, offset, _ = self.locate(np.array([sample]))
        name = self.shards[int(shard[0])].name
        return f"{name}, key {self.keys[sample]!r}, offset {int(offset[0])}"

    def _column(self, name: str) -> np.ndarray:
        try:
            column: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise index_build.damaged(self.folder, f"{name}.npy cannot be read: {error}") from error
        if column.shape != (len(self),):
            raise index_build.damaged(self.folder, f"{name}.npy has shape {column.shape}")
        return column


def open_index(
    shards: str | Path, index: str | Path | None = None, run: Path | None = None
) -> Index:
    """Open the index of a folder, brace pattern or URL of shards; build it if there is none.

    It stands in `index` if that is given, else beside the shards: in `deepclust-index/` for all
    *.tar of one folder, in `deepclust-index-<8 hex digits>/` for a subset. That of shards behind a
    URL stands in `index`, or in the `run` that reads them; one that was uploaded beside them is
    fetched, else one process reads all shards once while the others wait.

    Raises DataError if the shards' names or sizes are not those that were indexed, and whatever
    `build_index` raises.
    """
    found = expand(shards)
    folder = _place(found, index, run)
    if not (folder / index_build.MANIFEST).exists():
        _make(folder, found)
    index_build.check_shards(folder, found)
    return Index(folder, found)


def build_index(
    shards: str | Path, index: str | Path | None = None, *, verify: bool = False
) -> Index:
    """Scan all shards and write their index anew, in the place of one that is there.

    With `verify` nothing is written: every header and label is read again, and a DataError names
    the first shard that is not what the index says.

    Raises DataError for broken shards (see `scan.scan`) and when no sample has an image; DiskError
    when the index cannot be written where it should stand.
    """
    found = expand(shards)
    folder = _place(found, index)
    if verify:
        index_build.check_shards(folder, found)
        index_build.verify(folder, index_build.scan_all(found))
    else:
        index_build.write(folder, index_build.scan_all(found), replace=True)
    return Index(folder, found)


def _make(folder: Path, shards: list[Source]) -> None:
    if isinstance(shards[0], Path):
        index_build.write(folder, index_build.scan_all(shards), replace=False)
        return
    with held(folder.with_name(f".{folder.name}.lock"), "indexes the shards"):
        if (folder / index_build.MANIFEST).exists() or index_build.fetched(folder, shards):
            return
        index_build.write(folder, index_build.scan_all(shards), replace=False)


def _place(shards: list[Source], index: str | Path | None, run: Path | None = None) -> Path:
    if index is not None:
        return Path(index).absolute()
    folder = common_folder(shards)
    if isinstance(folder, Url):
        if run is not None:
            return run / "index"
        raise RecipeError(
            f"the index of {folder} cannot stand beside the shards: set data.index=FOLDER, or run "
            "`deepclust index URL --index FOLDER`"
        )
    if all(shard.parent == folder for shard in shards) and shards == expand(folder):
        return folder / index_build.FOLDER
    names = "\n".join(shard.name for shard in shards).encode()
    return folder / f"{index_build.FOLDER}-{hashlib.blake2b(names, digest_size=4).hexdigest()}"
