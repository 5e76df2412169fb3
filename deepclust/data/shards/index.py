"""The index of a set of shards: where every sample's image begins, and who the sample is.

A sample id is its shard's base plus its position in the shard. The key is only a name. All reads go
through the index, so a bad image keeps its id and shifts no other label. On disk an index is a
folder of some 25 bytes a sample:

    manifest.json     shards, fingerprint, excluded samples
    offsets.npy       uint64 [n], memory-mapped: the first byte of the image in its shard
    sizes.npy         uint32 [n], memory-mapped: the bytes of the image, 0 if it is excluded
    labels.npy        int32 [n], memory-mapped, only if a shard has labels, -1 for none
    keys.parquet      the keys, one row group a shard

The fingerprint is a blake2b over the shards' base names and sizes and every member's name, offset
and size. It contains no path and no time, so a copy of the shards has the same one.
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
from deepclust.data.shards.manifest import (
    FOLDER,
    MANIFEST,
    Manifest,
    check_members,
    check_shards,
    damaged,
    read_manifest,
)
from deepclust.data.shards.remote import fetch
from deepclust.data.shards.scan import scan_all
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError, RecipeError


class Location(NamedTuple):
    """Positions of images: shard ordinals, byte offsets and byte sizes, each int64 [m]."""

    shard: Int64[np.ndarray, " m"]
    offset: Int64[np.ndarray, " m"]
    size: Int64[np.ndarray, " m"]


class Keys(Sequence[str]):
    """The samples' keys by sample id, read from keys.parquet a shard at a time."""

    def __init__(self, path: Path, bases: Int64[np.ndarray, " s1"]) -> None:
        """Remember the file and `bases`, the shards' first sample ids and n."""
        self._path, self._bases = path, bases
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
        for shard in range(len(self._bases) - 1):
            yield from self._shard(shard).to_pylist()

    def _shard(self, shard: int) -> pa.ChunkedArray:
        if self._loaded is None or self._loaded[0] != shard:
            with pq.ParquetFile(self._path) as file:
                self._loaded = shard, file.read_row_group(shard)["key"]
        return self._loaded[1]


class Index:
    """An opened index: memory-mapped columns by sample id, cheap to open and to pickle.

    `lengths` are the shards' sizes in bytes, `excluded` the reasons by sample id.
    """

    def __init__(
        self, folder: Path, shards: list[Source], manifest: Manifest | None = None
    ) -> None:
        """Map the columns of the index in `folder` without opening the shards."""
        manifest = read_manifest(folder) if manifest is None else manifest
        self.folder, self.shards, self.manifest = folder, shards, manifest
        self.fingerprint = manifest["fingerprint"]
        self.excluded = {int(i): reason for i, reason in manifest["excluded"].items()}
        counts = [shard["samples"] for shard in manifest["shards"]]
        self.lengths = [shard["size"] for shard in manifest["shards"]]
        self.bases: Int64[np.ndarray, " s1"] = np.cumsum([0, *counts], dtype=np.int64)
        self.offsets: UInt64[np.ndarray, " n"] = self._column("offsets")
        self.sizes: UInt32[np.ndarray, " n"] = self._column("sizes")
        self.labels: Int32[np.ndarray, " n"] | None = None
        if manifest["labelled"]:
            self.labels = self._column("labels")

    def __len__(self) -> int:
        """Return the number of samples, with the excluded ones."""
        return int(self.bases[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the paths only: a worker process opens the files again."""
        return Index, (self.folder, self.shards)

    @cached_property
    def keys(self) -> Keys:
        """The samples' keys, read when first used."""
        return Keys(self.folder / "keys.parquet", self.bases)

    @cached_property
    def class_names(self) -> list[str] | None:
        """The names of the labels, from the dataset.json next to the shards, if there is one."""
        path = common_folder(self.shards) / "dataset.json"
        names: list[str] | None = json.loads(fetch(path) or b"{}").get("class_names")
        if names is not None and self.labels is not None and self.labels.max() >= len(names):
            raise DataError(
                f"{path} names {len(names)} classes, but labels reach {self.labels.max()}. "
                "Correct its class_names, or delete it."
            )
        return names

    def locate(self, sample_ids: Integer[np.ndarray, " m"]) -> Location:
        """Return where the images of these samples are (size 0 for excluded samples)."""
        ids = np.asarray(sample_ids, np.int64)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self)), "no such sample id"
        shard = np.searchsorted(self.bases, ids, side="right") - 1
        return Location(shard, self.offsets[ids].astype(np.int64), self.sizes[ids].astype(np.int64))

    def where(self, sample: int) -> str:
        """Return a sample's shard, key and offset, for messages."""
        shard, offset, _ = self.locate(np.array([sample]))
        name = self.shards[int(shard[0])].name
        return f"{name}, key {self.keys[sample]!r}, offset {int(offset[0])}"

    def _column(self, name: str) -> np.ndarray:
        try:
            column: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise damaged(self.folder, f"{name}.npy cannot be read: {error}") from error
        if column.shape != (len(self),):
            raise damaged(self.folder, f"{name}.npy has shape {column.shape}")
        return column


def open_index(
    shards: str | Path, index: str | Path | None = None, run_dir: Path | None = None
) -> Index:
    """Open the index of a folder, brace pattern or URL of shards, and build it if there is none.

    The index is the folder `index`, if that is given, else a folder next to the shards. Its name is
    `deepclust-index` for all *.tar of one folder, and `deepclust-index-<8 hex digits>` for some.
    For shards behind a URL it is `index`, or `run_dir / "index"` of the run that reads them. An
    index that was uploaded next to such shards is copied. Otherwise one process reads all shards
    once, and others wait for it.

    Raises DataError if the shards' names or sizes are not those that were indexed, and whatever
    `build_index` raises.
    """
    sources = expand(shards)
    folder = _place(shards, sources, index, run_dir)
    if not (folder / MANIFEST).exists():
        _make(folder, sources)
    manifest = read_manifest(folder)
    check_shards(folder, manifest, sources)
    return Index(folder, sources, manifest)


def build_index(
    shards: str | Path, index: str | Path | None = None, *, verify: bool = False
) -> Index:
    """Scan all shards and write their index in place of an old one.

    With `verify` nothing is written. Every header and label is read again, and a DataError names
    the first shard that is not as the index says.

    Raises DataError for broken shards (see `scan.scan`) and when no sample has an image. Raises
    DiskError when the index cannot be written.
    """
    sources = expand(shards)
    folder = _place(shards, sources, index)
    if not verify:
        index_build.write(folder, scan_all(sources), replace=True)
        return Index(folder, sources)
    manifest = read_manifest(folder)
    check_shards(folder, manifest, sources)
    check_members(folder, manifest, scan_all(sources))
    return Index(folder, sources, manifest)


def _make(folder: Path, shards: list[Source]) -> None:
    if isinstance(shards[0], Path):
        index_build.write(folder, scan_all(shards), replace=False)
        return
    # All bytes of remote shards are read, so one process does it for all.
    with held(folder.with_name(f".{folder.name}.lock"), "indexes the shards"):
        if (folder / MANIFEST).exists() or index_build.copy_remote(folder, shards):
            return
        index_build.write(folder, scan_all(shards), replace=False)


def _place(
    shards: str | Path, sources: list[Source], index: str | Path | None, run_dir: Path | None = None
) -> Path:
    """Return the folder of the index of `sources`, which `shards` was expanded to."""
    if index is not None:
        return Path(index).absolute()
    folder = common_folder(sources)
    if isinstance(folder, Url):
        if run_dir is not None:
            return run_dir / "index"
        raise RecipeError(
            f"the index of {folder} cannot be next to the shards: set data.index=FOLDER, or run "
            "`deepclust index URL --index FOLDER`"
        )
    # A folder was listed already; what a pattern names may be all of its folder, or a part.
    if Path(shards).is_dir() or (
        all(source.parent == folder for source in sources) and sources == expand(folder)
    ):
        return folder / FOLDER
    names = "\n".join(source.name for source in sources).encode()
    return folder / f"{FOLDER}-{hashlib.blake2b(names, digest_size=4).hexdigest()}"
