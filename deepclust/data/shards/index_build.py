"""Write an index, read its manifest, and tell whether the shards are still those it was made of.

What the columns mean stands in `index.py`. An index appears in one piece: it is filled in a
temporary folder, which is then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepclust.data.shards import remote
from deepclust.data.shards.file_lock import TELL_S
from deepclust.data.shards.scan import Scan, scan
from deepclust.data.shards.url import Source, Url, common_folder
from deepclust.errors import DataError, DiskError
from deepclust.files import atomic_folder, read_json, write_json

MANIFEST = "manifest.json"
FOLDER = "deepclust-index"

_FORMAT = 1
_THREADS = 8
_WORTH_THREADS = 1 << 30
_SCHEMA = pa.schema([("key", pa.string())])


def scan_all(shards: Sequence[Source]) -> Iterator[Scan]:
    """Scan in order. Threads wait for the disk together; little data is read sooner without."""
    far, total = isinstance(shards[0], Url), sum(_size(shard) for shard in shards)
    if not far and total < _WORTH_THREADS:
        yield from map(scan, shards)
        return
    left = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            scans = pool.map(lambda shard: scan(shard, left.is_set), shards)
            yield from _told(scans, total) if far else scans
        finally:
            left.set()


def _told(scans: Iterator[Scan], total: int) -> Iterator[Scan]:
    """The same scans, with a line in the log every 10 seconds: all their bytes are fetched."""
    began = told = time.monotonic()
    done = 0
    for one in scans:
        done += one.size
        if (now := time.monotonic()) - told > TELL_S:
            told, rate = now, done / 1e6 / (now - began)
            logging.getLogger("deepclust").info(
                "indexed %.1f of %.1f GB, %.0f MB/s", done / 1e9, total / 1e9, rate
            )
        yield one


def _size(shard: Source) -> int:
    return shard.size if isinstance(shard, Url) else shard.stat().st_size


def write(folder: Path, scans: Iterator[Scan], *, replace: bool) -> None:
    """Write the index in one piece; another process that was faster is as good."""
    _put(folder, lambda partial: _fill(partial, scans), replace=replace)


def fetched(folder: Path, shards: Sequence[Source]) -> bool:
    """Take the index that lies beside remote shards, if it is of just these shards."""
    place = common_folder(shards) / FOLDER
    if not isinstance(place, Url) or (data := remote.fetch(place / MANIFEST)) is None:
        return False

    def fill(partial: Path) -> None:
        (partial / MANIFEST).write_bytes(data)
        check_shards(partial, shards)
        manifest = read_manifest(partial)
        columns = ["offsets.npy", "sizes.npy", *(["labels.npy"] if manifest["labelled"] else [])]
        for name in (*columns, "keys.parquet"):
            remote.save(place / name, partial / name)

    try:
        _put(folder, fill, replace=False)
    except DataError as error:  # torn, or of other shards: theirs to repair, ours to do without
        logging.getLogger("deepclust").info("%s is left aside: %s", place, error)
        return False
    return True


def _put(folder: Path, fill: Callable[[Path], None], *, replace: bool) -> None:
    def make_room() -> None:
        if replace and (folder / MANIFEST).exists():
            shutil.rmtree(folder)

    try:
        atomic_folder(folder, fill, make_room)
    except DiskError as error:
        raise DiskError(
            f"{error} The index need not stand beside the shards: set data.index=FOLDER, or run "
            "`deepclust index SHARDS --index FOLDER`."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"{folder} holds other things than an index. Choose a folder that is not there yet."
            ) from error


def _fill(folder: Path, scans: Iterator[Scan]) -> None:
    done = []
    with pq.ParquetWriter(folder / "keys.parquet", _SCHEMA, compression="zstd") as keys:
        for one in scans:
            keys.write_table(pa.table([one.keys], schema=_SCHEMA), row_group_size=len(one.keys))
            done.append(one)
    labels = np.concatenate([one.labels for one in done])
    np.save(folder / "offsets.npy", np.concatenate([one.offsets for one in done]))
    np.save(folder / "sizes.npy", np.concatenate([one.sizes for one in done]))
    if (labels >= 0).any():
        np.save(folder / "labels.npy", labels)
    write_json(folder / MANIFEST, _manifest(done, bool((labels >= 0).any())))


def _manifest(scans: list[Scan], labelled: bool) -> dict[str, Any]:
    bases = np.cumsum([0, *(len(one.keys) for one in scans)])
    excluded = {
        int(base) + i: reason
        for base, one in zip(bases, scans, strict=False)
        for i, reason in one.excluded.items()
    }
    if len(excluded) == bases[-1]:
        raise DataError(
            f"none of the {bases[-1]} samples has an image ({excluded[0]}). Images are .jpg, "
            ".jpeg, .png, .webp or .ppm."
        )
    shards = [
        {"name": one.name, "size": one.size, "samples": len(one.keys), "digest": one.digest}
        for one in scans
    ]
    identity = repr([(one.name, one.size, one.digest) for one in scans]).encode()
    return {
        "format": _FORMAT,
        "fingerprint": hashlib.blake2b(identity, digest_size=16).hexdigest(),
        "labelled": labelled,
        "shards": shards,
        "excluded": excluded,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index; a DataError says what to do when there is none that we can read."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError as error:
        raise DataError(f"no index in {folder}. `deepclust index SHARDS` writes it.") from error
    except ValueError as error:
        raise damaged(folder, f"{MANIFEST} is no JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise damaged(folder, f"its manifest is not of format {_FORMAT}")
    return manifest


def damaged(folder: Path, what: str) -> DataError:
    """The error for an index that cannot be used."""
    return DataError(
        f"the index {folder} is damaged: {what}. `deepclust index SHARDS` writes it anew."
    )


def check_shards(folder: Path, shards: Sequence[Source]) -> None:
    """Compare names and sizes, which costs no reading."""
    known = {shard["name"]: shard["size"] for shard in read_manifest(folder)["shards"]}
    found = {shard.name: _size(shard) for shard in shards}
    for name in sorted(known.keys() | found.keys()):
        if name not in found:
            raise _changed(folder, f"{name} is gone")
        if name not in known:
            raise _changed(folder, f"{name} is new")
        if known[name] != found[name]:
            raise _changed(folder, f"{name} had {known[name]} bytes and has {found[name]}")
    _check_touched(folder, [shard for shard in shards if isinstance(shard, Path)])


def _check_touched(folder: Path, paths: list[Path]) -> None:
    """Read those shards' headers again that were written after the index was.

    A tar is padded to 10 KiB, so one with other members may well have the size of the old one. The
    time is a hint for when to look, never part of the fingerprint: a copy passes, and is then
    remembered as looked at.
    """
    indexed = (folder / MANIFEST).stat().st_mtime_ns
    touched = [path for path in paths if path.stat().st_mtime_ns > indexed]
    if not touched:
        return
    known = {shard["name"]: shard["digest"] for shard in read_manifest(folder)["shards"]}
    for one in scan_all(touched):
        if known[one.name] != one.digest:
            raise _changed(folder, f"{one.name} holds other members")
    with contextlib.suppress(OSError):  # a read-only index is looked at each time
        os.utime(folder / MANIFEST)


def verify(folder: Path, scans: Iterator[Scan]) -> None:
    """Compare every shard's members with what the index says."""
    for known, one in zip(read_manifest(folder)["shards"], scans, strict=True):
        if known["digest"] != one.digest:
            raise _changed(folder, f"{one.name} holds other members")


def _changed(folder: Path, what: str) -> DataError:
    return DataError(
        f"the shards are not those that were indexed in {folder}: {what}. Bring the old ones back "
        "(then `deepclust index SHARDS --verify` checks every member), or index the new ones with "
        "`deepclust index SHARDS`; runs that began with the old ones will refuse the new."
    )
