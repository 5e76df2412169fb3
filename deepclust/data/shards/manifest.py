"""The manifest of an index, and the check that the shards are still those it was made from.

`manifest.json` is read once, when an index is opened. Everything here takes it as a value.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from deepclust.data.shards.scan import Scan, scan_all, size_of
from deepclust.data.shards.url import Source
from deepclust.errors import DataError
from deepclust.files import read_json

MANIFEST = "manifest.json"
FOLDER = "deepclust-index"
FORMAT = 1


class ShardEntry(TypedDict):
    """One shard: base name, size in bytes, number of samples, and digest of its members."""

    name: str
    size: int
    samples: int
    digest: str


class Manifest(TypedDict):
    """The content of manifest.json, where `excluded` maps sample ids (as text) to reasons."""

    format: int
    fingerprint: str
    labelled: bool
    shards: list[ShardEntry]
    excluded: dict[str, str]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an index.

    Raises DataError, with the command that mends it, if it is missing or cannot be read.
    """
    try:
        manifest: Manifest = read_json(folder / MANIFEST)
    except FileNotFoundError as error:
        raise DataError(f"no index in {folder}. `deepclust index SHARDS` writes it.") from error
    except ValueError as error:
        raise damaged(folder, f"{MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(folder, f"its manifest does not have format {FORMAT}")
    return manifest


def damaged(folder: Path, what: str) -> DataError:
    """Return the error for an index that cannot be used."""
    return DataError(
        f"the index {folder} is damaged: {what}. `deepclust index SHARDS` writes it again."
    )


def check_shards(folder: Path, manifest: Manifest, shards: Sequence[Source]) -> None:
    """Compare names and sizes, and read the headers of shards that are newer than the index.

    Raises DataError that names the first shard that differs.
    """
    indexed = {entry["name"]: entry["size"] for entry in manifest["shards"]}
    sizes = {shard.name: size_of(shard) for shard in shards}
    for name in sorted(indexed.keys() | sizes.keys()):
        if name not in sizes:
            raise _changed(folder, f"{name} is gone")
        if name not in indexed:
            raise _changed(folder, f"{name} is new")
        if indexed[name] != sizes[name]:
            raise _changed(folder, f"{name} had {indexed[name]} bytes and now has {sizes[name]}")
    _check_newer(folder, manifest, [shard for shard in shards if isinstance(shard, Path)])


def check_members(folder: Path, manifest: Manifest, scans: Iterable[Scan]) -> None:
    """Raise DataError if the members of scanned shards are not those of the manifest."""
    digests = {entry["name"]: entry["digest"] for entry in manifest["shards"]}
    for one in scans:
        if digests[one.name] != one.digest:
            raise _changed(folder, f"{one.name} holds other members")


def _check_newer(folder: Path, manifest: Manifest, paths: list[Path]) -> None:
    """Read the headers of shards that were written after the index.

    A tar is padded to 10 KiB, so one with other members can have the same size. The time only
    decides when to read: a copy passes, and the index is then marked as newer than the copy.
    """
    indexed = (folder / MANIFEST).stat().st_mtime_ns
    newer = [path for path in paths if path.stat().st_mtime_ns > indexed]
    if not newer:
        return
    check_members(folder, manifest, scan_all(newer))
    # A read-only index keeps its time, and the headers are read at every start.
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)


def _changed(folder: Path, what: str) -> DataError:
    return DataError(
        f"the shards are not those that were indexed in {folder}: {what}. Restore the old ones "
        "(then `deepclust index SHARDS --verify` checks every member), or index the new ones with "
        "`deepclust index SHARDS`; runs that began with the old ones will refuse the new."
    )
