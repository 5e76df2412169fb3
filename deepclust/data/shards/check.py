"""Whether an index is whole, and whether the shards are still those that it was made from.

Whenever an index is opened, names and sizes of the shards are compared, and the headers and labels
of shards that are newer. The manifest and the columns are hashed, but of a column above 64 MiB only
the size is looked at. `deepclust index --verify` reads every header and label and compares them
with every row. The bytes of images are compared only where `index --bodies` has hashed them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from deepclust.data.shards import remote
from deepclust.data.shards.keys import KEYS, check_keys, read_keys
from deepclust.data.shards.manifest import (
    MANIFEST,
    Manifest,
    damaged,
    scanned_fields,
)
from deepclust.data.shards.scan import Scan, named, scan_all, size_of
from deepclust.data.shards.url import Source, names_of
from deepclust.errors import DataError
from deepclust.files import file_hash

DTYPES = {
    "offsets": np.uint64,
    "sizes": np.uint32,
    "labels": np.int32,
    "path_ends": np.uint64,  # of image files (`loose/files.py`)
    "sources": np.uint16,
}
HASHED_AT_OPEN = 64 << 20  # bytes; larger columns are hashed by --verify
_SMALL = 1 << 22  # samples of an older index, whose places are all looked at when it is opened


class LabelsChangedError(DataError):
    """The members of a shard are as they were, and its labels are not."""


def column_names(manifest: Manifest) -> list[str]:
    """Return the columns that an index has."""
    return ["offsets", "sizes", *(["labels"] if manifest["labelled"] else [])]


def load_column(folder: Path, name: str, samples: int) -> np.ndarray:
    """Return a column, memory-mapped; raise DataError if it is not one of `samples` rows."""
    try:
        column: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r")
    except FileNotFoundError as error:
        raise damaged(folder, f"{name}.npy is missing") from error
    except Exception as error:  # of a damaged header NumPy raises many types, SyntaxError too
        raise damaged(folder, f"{name}.npy is not a column of numbers") from error
    if column.shape != (samples,) or column.dtype != DTYPES[name]:
        raise damaged(folder, f"{name}.npy has shape {column.shape} and type {column.dtype}")
    return column


def check_columns(folder: Path, manifest: Manifest, largest: int | None = HASHED_AT_OPEN) -> None:
    """Compare the index's files with their sizes and hashes (of files up to `largest` bytes).

    An index of an older version has no hashes: its rows are compared with the shards' sizes.
    """
    columns = manifest.get("columns")
    for name, written in (columns or {}).items():
        path = folder / name
        if "/" in name or not path.is_file():
            raise damaged(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != written.get("bytes"):
            raise damaged(folder, f"{name} had {written.get('bytes')} bytes and has {size}")
        if (largest is None or size <= largest) and file_hash(path) != written.get("hash"):
            raise damaged(folder, f"{name} is not as it was written")
    samples = sum(entry["samples"] for entry in manifest["shards"])
    for name in column_names(manifest):
        load_column(folder, name, samples)
    check_keys(folder, manifest)
    if columns is None and samples <= _SMALL:
        check_places(folder, manifest)


def check_places(folder: Path, manifest: Manifest) -> None:
    """Raise DataError if an image lies outside its shard, or is empty and not excluded."""
    samples = sum(entry["samples"] for entry in manifest["shards"])
    offsets, sizes = (load_column(folder, name, samples) for name in ("offsets", "sizes"))
    base, empty = 0, 0
    for entry in manifest["shards"]:
        part = slice(base, base + entry["samples"])
        base, own = part.stop, sizes[part].astype(np.uint64)
        room = np.uint64(entry["size"]) - np.minimum(own, np.uint64(entry["size"]))
        if (own > entry["size"]).any() or (offsets[part] > room).any():
            raise damaged(folder, f"an image lies outside {entry['name']}")
        empty += int((own == 0).sum())
    ids = np.array([int(i) for i in manifest["excluded"]], np.int64)
    if empty != len(ids) or sizes[ids].any():
        raise damaged(folder, "its excluded samples are not those without an image")


def check_shards(folder: Path, manifest: Manifest, shards: Sequence[Source]) -> None:
    """Compare names and sizes, and read the headers of shards that are newer than the index.

    Raises DataError that names the first shard that differs, and `LabelsChangedError`.
    """
    indexed = {entry["name"]: entry["size"] for entry in manifest["shards"]}
    names = names_of(shards)
    sizes = {name: size_of(shard) for name, shard in zip(names, shards, strict=True)}
    for name in sorted(indexed.keys() | sizes.keys()):
        if name not in sizes:
            raise changed(folder, f"{name} is gone")
        if name not in indexed:
            raise changed(folder, f"{name} is new")
        if indexed[name] != sizes[name]:
            raise changed(folder, f"{name} had {indexed[name]} bytes and now has {sizes[name]}")
    _check_newer(folder, manifest, dict(zip(names, shards, strict=True)))


def verify(folder: Path, manifest: Manifest, shards: Sequence[Source]) -> None:
    """Compare every row of an index with the shards, and their bytes where they were hashed.

    Raises DataError that says whether the index or a shard is at fault.
    """
    scans = scan_all(shards, scanned_fields(manifest))
    verify_rows(folder, manifest, named(scans, names_of(shards)))
    for shard, entry in zip(shards, manifest["shards"], strict=True):
        if "bodies" in entry and hash_shard(shard) != entry["bodies"]:
            raise changed(folder, f"{entry['name']} has the same members, but other bytes in them")


def verify_rows(folder: Path, manifest: Manifest, scans: Iterable[Scan]) -> None:
    """Compare the files of an index with their hashes, and every row with scans of all shards."""
    check_columns(folder, manifest, largest=None)
    check_places(folder, manifest)
    check_members(folder, manifest, scans, _Rows(folder, manifest).check)


def hash_shard(shard: Source) -> str:
    """Return the blake2b of all bytes of a shard."""
    if isinstance(shard, Path):
        return file_hash(shard)
    digest = hashlib.blake2b(digest_size=16)
    for piece in remote.stream(shard, 0, shard.size):
        digest.update(piece)
    return digest.hexdigest()


def check_members(
    folder: Path,
    manifest: Manifest,
    scans: Iterable[Scan],
    also: Callable[[int, Scan], None] = lambda number, one: None,
) -> None:
    """Raise DataError unless members and labels of scanned shards are those of the manifest.

    `also` is then called with each shard's number and scan.
    """
    entries = {entry["name"]: (i, entry) for i, entry in enumerate(manifest["shards"])}
    for one in scans:
        number, entry = entries[one.name]
        if entry["digest"] != one.digest:
            raise changed(folder, f"{one.name} holds other members")
        if entry.get("labels", one.labels_digest) != one.labels_digest:
            raise labels_changed(folder, one.name)
        also(number, one)


class _Rows:
    """The rows of an index, compared with scans of the same members."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        counts = [entry["samples"] for entry in manifest["shards"]]
        self.folder, self.manifest = folder, manifest
        self.bases = np.cumsum([0, *counts], dtype=np.int64)
        self.keys = read_keys(folder, range(len(counts)))  # scans come in this order
        names = column_names(manifest)
        self.columns = {name: load_column(folder, name, int(self.bases[-1])) for name in names}

    def check(self, number: int, one: Scan) -> None:
        """Raise DataError if the rows of a shard are not those of its scan."""
        part = slice(int(self.bases[number]), int(self.bases[number + 1]))
        self.check_labels(number, one)
        for name, scanned in (("offsets", one.offsets), ("sizes", one.sizes)):
            if not np.array_equal(self.columns[name][part], scanned):
                raise self._wrong(f"{name}.npy", one)
        if next(self.keys).to_pylist() != one.keys.to_pylist():
            raise self._wrong(KEYS, one)
        ids = range(part.start, part.stop)
        if set(one.excluded) != {
            i - part.start for i in ids if str(i) in self.manifest["excluded"]
        }:
            raise self._wrong(MANIFEST, one)

    def check_labels(self, number: int, one: Scan) -> None:
        """Raise `LabelsChangedError` if a shard has other labels than the rows of the index."""
        part = slice(int(self.bases[number]), int(self.bases[number + 1]))
        column = self.columns.get("labels")
        if column is not None and not np.array_equal(column[part], self._labels(one)):
            raise labels_changed(self.folder, one.name)

    def _labels(self, one: Scan) -> np.ndarray:
        if one.classes is None:
            return one.labels
        names = self.manifest.get("classes")
        number = {name: i for i, name in enumerate(names or [])}
        values = [int(name) if names is None else number.get(name, -2) for name in one.classes]
        numbers: np.ndarray = np.array([*values, -1], np.int32)[one.labels]
        return numbers

    def _wrong(self, file: str, one: Scan) -> DataError:
        return damaged(self.folder, f"{file} has other rows than {one.name}, which is as indexed")


def _check_newer(folder: Path, manifest: Manifest, shards: Mapping[str, Source]) -> None:
    """Read the headers and labels of shards that were written after the index.

    A tar is padded to 10 KiB, so one with other members can have the same size. The time only
    decides when to read: a copy passes, and the index is then marked as newer than the copy.
    """
    indexed = (folder / MANIFEST).stat().st_mtime_ns
    paths = {name: shard for name, shard in shards.items() if isinstance(shard, Path)}
    newer = {name: path for name, path in paths.items() if path.stat().st_mtime_ns > indexed}
    if not newer:
        return
    scans = named(scan_all(list(newer.values()), scanned_fields(manifest)), newer)
    check_members(folder, manifest, scans, _Rows(folder, manifest).check_labels)
    # A read-only index keeps its time, and the headers are read at every start.
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)


def labels_changed(folder: Path, where: str) -> DataError:
    """Return the error for a shard or a list whose labels are others than when it was indexed."""
    return LabelsChangedError(
        f"the labels in {where} are not those that were indexed in {folder}. "
        f"`deepclust index SHARDS --index {folder}` reads them again; ids and fingerprint stay."
    )


def changed(folder: Path, what: str) -> DataError:
    """Return the error for shards or images that are not those of the index."""
    return DataError(
        f"the images are not those that were indexed in {folder}: {what}. Restore the old ones "
        "(then `deepclust index SHARDS --verify` checks every member), or index the new ones with "
        f"`deepclust index SHARDS --index {folder}`. Runs that began with the old ones will refuse "
        "the new."
    )
