"""Write an index: from scans of the shards, or as a copy of one that lies next to remote shards.

The columns are described in `index.py`. An index is filled in a temporary folder, which is then
renamed, so that a half-written one is never visible.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32

from deepclust.data.owned_folder import FILE as OWNER
from deepclust.data.owned_folder import owned, sweep
from deepclust.data.shards import remote
from deepclust.data.shards.check import (
    DTYPES,
    check_columns,
    check_places,
    check_shards,
    column_names,
    hash_shard,
)
from deepclust.data.shards.fields import AUTO, IMAGE_EXTENSIONS, Fields
from deepclust.data.shards.keys import KEYS
from deepclust.data.shards.left_out import Tally, listed, shown
from deepclust.data.shards.manifest import (
    FOLDER,
    FORMAT,
    MANIFEST,
    Manifest,
    ShardEntry,
    fields_of,
    fingerprint,
    read_manifest,
    seal,
)
from deepclust.data.shards.scan import Scan, named, scan, scan_all
from deepclust.data.shards.url import Source, Url, common_folder, names_of
from deepclust.errors import DataError, DiskError
from deepclust.files import atomic_folder, file_hash, write_json

ELSEWHERE = (
    "The index need not be next to the images: set data.index=FOLDER, or run "
    "`deepclust index SHARDS --index FOLDER`."
)
_SCHEMA = pa.schema([("key", pa.string())])
_LARGEST_FETCHED = 256 << 20  # bytes of a manifest behind a URL
_LARGEST_LABEL = int(np.iinfo(np.int32).max)
_OWN_FILES = {*(f"{name}.npy" for name in DTYPES), KEYS, MANIFEST, "paths.bin", "watched.json"}


def write(
    folder: Path,
    shards: Sequence[Source],
    fields: Fields,
    beside: Tally,
    *,
    replace: bool,
    bodies: bool = False,
) -> None:
    """Write the index, but keep one that another process finished first unless `replace`.

    `beside` counts files next to the shards that are not read. `bodies` hashes all bytes too.
    """

    def fill_all(partial: Path) -> None:
        scans, used = _scans(shards, fields)
        manifest = fill(partial, named(scans, names_of(shards)), used, beside)
        manifest["fields"] = fields._asdict()
        if used != fields:
            manifest["image_field"] = used.image
        if bodies:
            for shard, entry in zip(shards, manifest["shards"], strict=True):
                entry["bodies"] = hash_shard(shard)
        save(partial, manifest)

    put(folder, fill_all, replace=replace)


def save(folder: Path, manifest: Manifest) -> None:
    """Seal and write a manifest."""
    manifest["seal"] = seal(manifest)
    write_json(folder / MANIFEST, manifest)


def copy_remote(folder: Path, shards: Sequence[Source], fields: Fields) -> bool:
    """Copy the index next to remote shards, and return whether there is one of just these.

    Its sizes are known from the manifest before anything is copied.
    """
    place = common_folder(shards) / FOLDER
    if not isinstance(place, Url):
        return False

    def copy(partial: Path) -> None:
        data = remote.fetch(place / MANIFEST, _LARGEST_FETCHED)
        if data is None:
            raise DataError("it has no manifest")
        (partial / MANIFEST).write_bytes(data)
        manifest = read_manifest(partial)
        check_shards(partial, manifest, shards)
        if fields_of(manifest) != fields:
            raise DataError(f"it was made for {fields_of(manifest)}")
        samples = sum(entry["samples"] for entry in manifest["shards"])
        for name in column_names(manifest):
            largest = 4096 + np.dtype(DTYPES[name]).itemsize * samples
            remote.save(place / f"{name}.npy", partial / f"{name}.npy", largest)
        # A key is in a header of its shard, so that all of them are smaller than the shards.
        largest = (1 << 20) + sum(entry["size"] for entry in manifest["shards"])
        remote.save(place / KEYS, partial / KEYS, largest)
        check_columns(partial, manifest, largest=None)
        check_places(partial, manifest)

    try:
        put(folder, copy, replace=False)
    except DataError as error:
        if isinstance(error, remote.UnreachableError) and error.kind == "down":
            raise
        # It is torn, or of other shards. We cannot mend it there, and can do without it.
        logging.getLogger("deepclust").info("%s is not used: %s", place, error)
        return False
    return True


def put(folder: Path, fill: Callable[[Path], None], *, replace: bool) -> None:
    """Fill a temporary folder and rename it; one that another process finished stays."""

    def make_room() -> None:
        if (replace and (folder / MANIFEST).exists()) or _is_torn(folder):
            shutil.rmtree(folder)

    def fill_own(partial: Path) -> None:
        with owned(partial):
            fill(partial)

    try:
        sweep(folder)  # of an `index` that was killed
        atomic_folder(folder, fill_own, make_room)
    except DiskError as error:
        raise DiskError(f"{error} {ELSEWHERE}") from error
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"{folder} holds files that are not an index. Choose a folder that does not exist."
            ) from error


def _is_torn(folder: Path) -> bool:
    """Return whether this was an index, and has lost its manifest."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(names) and MANIFEST not in names and names <= _OWN_FILES


def _scans(shards: Sequence[Source], fields: Fields) -> tuple[Iterator[Scan], Fields]:
    """Return the scans, and with image=auto the field that all samples of the first shard have."""
    first = scan(shards[0], fields=fields)
    if fields.image == AUTO and first.common is not None:
        used = fields._replace(image=first.common)
        return scan_all(shards, used), used
    rest = scan_all(shards[1:], fields) if len(shards) > 1 else iter(())
    return itertools.chain([first], rest), fields


def fill(folder: Path, scans: Iterator[Scan], used: Fields, beside: Tally) -> Manifest:
    """Write the columns, and return the manifest of what was scanned."""
    done = []
    with pq.ParquetWriter(folder / KEYS, _SCHEMA, compression="zstd") as keys:
        for one in scans:
            if one.pairs is not None:
                raise _glued(one, *one.pairs)
            keys.write_table(pa.table([one.keys], schema=_SCHEMA), row_group_size=len(one.keys))
            # keys are on disk now, and those of 100M samples would take more memory than all else
            # (a slice of them would hold all of its memory)
            done.append(dataclasses.replace(one, keys=pa.array([], pa.string())))
    labels, classes = _numbered(done)
    labelled = any((own >= 0).any() for own in labels)
    _save(folder, "offsets", [one.offsets for one in done])
    _save(folder, "sizes", [one.sizes for one in done])
    if labelled:
        _save(folder, "labels", labels)
    manifest = _manifest(done, labelled, beside)
    if classes is not None:
        manifest["classes"] = classes
    _check_useful(manifest, used, sum(len(one.offsets) for one in done))
    manifest["columns"] = {
        path.name: {"bytes": path.stat().st_size, "hash": file_hash(path)}
        for path in sorted(folder.iterdir())
        if path.name != OWNER
    }
    return manifest


def _save(folder: Path, name: str, pieces: list[np.ndarray]) -> None:
    """Write a column as `np.save` does, but piece by piece: whole, it would be there twice."""
    dtype, count = np.dtype(DTYPES[name]), sum(map(len, pieces))
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    with open(folder / f"{name}.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


def _numbered(scans: list[Scan]) -> tuple[list[Int32[np.ndarray, " m"]], list[str] | None]:
    """Return each shard's labels, and the sorted names that they number (None: all are numbers)."""
    names = sorted({name for one in scans for name in one.classes or ()})
    numeric = all(n.isascii() and n.isdecimal() and len(n) < 11 for n in names)
    numeric = numeric and all(int(name) <= _LARGEST_LABEL for name in names)
    number = {name: int(name) if numeric else i for i, name in enumerate(names)}
    columns = []
    for one in scans:
        own = [number[name] for name in one.classes or ()]
        table = np.array([*own, -1], np.int32)
        columns.append(one.labels if one.classes is None else table[one.labels])
    return columns, names if names and not numeric else None


def _manifest(scans: list[Scan], labelled: bool, beside: Tally) -> Manifest:
    bases = np.cumsum([0, *(len(one.offsets) for one in scans)])
    excluded = {
        str(int(base) + i): reason
        for base, one in zip(bases, scans, strict=False)
        for i, reason in one.excluded.items()
    }
    left, unlabelled = Tally(), Tally()
    for one in scans:
        left.merge(one.left)
        unlabelled.merge(one.unlabelled)
    left.merge(beside)
    shards = [entry_of(one) for one in scans]
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(shards),
        "labelled": labelled,
        "shards": shards,
        "excluded": excluded,
        "left_out": left.as_dict(),
        "unlabelled": unlabelled.as_dict(),
    }


def entry_of(one: Scan) -> ShardEntry:
    """Return what a manifest says of a shard."""
    return {
        "name": one.name,
        "size": one.size,
        "samples": len(one.offsets),
        "digest": one.digest,
        "labels": one.labels_digest,
    }


def _check_useful(manifest: Manifest, used: Fields, samples: int) -> None:
    """Raise DataError if no sample has an image, or not the label that was asked for."""
    excluded, asked = manifest["excluded"], used.image != AUTO
    if len(excluded) == samples:
        wanted = "" if asked else f" Images are .{', .'.join(IMAGE_EXTENSIONS)}"
        raise DataError(
            f"none of the {samples} samples has an image ({excluded['0']}).{wanted}; "
            "data.image=FIELD takes the member KEY.FIELD, for example data.image=input.jpg."
        )
    if used.names_classes and not manifest["labelled"]:
        why = Tally(manifest["unlabelled"])
        raise DataError(
            f"data.labels={used.labels}: no sample has such a label: {why}. "
            "data.labels=none goes on without labels."
        )


def _glued(one: Scan, key: str, fields: list[str]) -> DataError:
    some = listed(f".{name}" for name in fields)
    return DataError(
        f"shard {one.name}: key {shown(key)!r} holds {len(fields)} images ({some}), because a key "
        "ends at the first dot of the name. If they are images of their own (frames), write the "
        "shard again with names without further dots, for example clip_0001.png for "
        f"clip.0001.png. If they belong together, choose one: data.image={shown(fields[0])}."
    )
