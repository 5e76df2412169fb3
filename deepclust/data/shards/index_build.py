"""Write an index: from scans of the shards, or as a copy of one that lies next to remote shards.

The columns are described in `index.py`. An index is filled in a temporary folder, which is then
renamed, so that a half-written one is never visible.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepclust.data.shards import remote
from deepclust.data.shards.manifest import (
    FOLDER,
    FORMAT,
    MANIFEST,
    Manifest,
    check_shards,
    read_manifest,
)
from deepclust.data.shards.scan import Scan
from deepclust.data.shards.url import Source, Url, common_folder
from deepclust.errors import DataError, DiskError
from deepclust.files import atomic_folder, write_json

_SCHEMA = pa.schema([("key", pa.string())])


def write(folder: Path, scans: Iterator[Scan], *, replace: bool) -> None:
    """Write the index, but keep one that another process finished first unless `replace`."""
    _put(folder, lambda partial: _fill(partial, scans), replace=replace)


def copy_remote(folder: Path, shards: Sequence[Source]) -> bool:
    """Copy the index next to remote shards, and return whether there is one of just these."""
    place = common_folder(shards) / FOLDER
    if not isinstance(place, Url) or (data := remote.fetch(place / MANIFEST)) is None:
        return False

    def fill(partial: Path) -> None:
        (partial / MANIFEST).write_bytes(data)
        manifest = read_manifest(partial)
        check_shards(partial, manifest, shards)
        columns = ["offsets.npy", "sizes.npy", *(["labels.npy"] if manifest["labelled"] else [])]
        for name in (*columns, "keys.parquet"):
            remote.save(place / name, partial / name)

    try:
        _put(folder, fill, replace=False)
    except DataError as error:
        # It is torn, or of other shards. We cannot mend it there, and can do without it.
        logging.getLogger("deepclust").info("%s is not used: %s", place, error)
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
            f"{error} The index need not be next to the shards: set data.index=FOLDER, or run "
            "`deepclust index SHARDS --index FOLDER`."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"{folder} holds files that are not an index. Choose a folder that does not exist."
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


def _manifest(scans: list[Scan], labelled: bool) -> Manifest:
    bases = np.cumsum([0, *(len(one.keys) for one in scans)])
    excluded = {
        str(int(base) + i): reason
        for base, one in zip(bases, scans, strict=False)
        for i, reason in one.excluded.items()
    }
    if len(excluded) == bases[-1]:
        raise DataError(
            f"none of the {bases[-1]} samples has an image ({excluded['0']}). Images are .jpg, "
            ".jpeg, .png, .webp or .ppm."
        )
    identity = repr([(one.name, one.size, one.digest) for one in scans]).encode()
    return {
        "format": FORMAT,
        "fingerprint": hashlib.blake2b(identity, digest_size=16).hexdigest(),
        "labelled": labelled,
        "shards": [
            {"name": one.name, "size": one.size, "samples": len(one.keys), "digest": one.digest}
            for one in scans
        ],
        "excluded": excluded,
    }
