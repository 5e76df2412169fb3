"""Whether image files are still those that were indexed.

When an index is opened, the folders and lists are looked at. If one was written after the index,
names, labels and times of all files are compared, and files that are newer are looked at again. A
file that changes in place, or vanishes, is met when it is read (`read/image_files.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepclust.data.loose.files import File, FilePaths
from deepclust.data.loose.find import Place
from deepclust.data.loose.source import Opened, open_places, roots_of, scan_files
from deepclust.data.pack.blobs import read_file
from deepclust.data.pack.walk import COPIED
from deepclust.data.shards.check import changed, labels_changed, load_column, verify_rows
from deepclust.data.shards.index_build import entry_of
from deepclust.data.shards.left_out import listed
from deepclust.data.shards.manifest import MANIFEST, Manifest, damaged, fields_of, fingerprint
from deepclust.data.shards.scan import Scan
from deepclust.errors import DataError

WATCHED = "watched.json"  # the folders that were listed, each with the number of its place


def check_unchanged(folder: Path, manifest: Manifest, places: Sequence[Place]) -> None:
    """Raise DataError that names a file that is new, gone or changed, or `LabelsChangedError`."""
    indexed = (folder / MANIFEST).stat().st_mtime_ns
    if not any(_is_newer(path, indexed) for path in _watched(folder, manifest, places)):
        return
    opened = open_places(places, fields_of(manifest).labels)
    paths = _paths(folder, manifest, places)
    known = opened.digest == manifest.get("files", {}).get("digest")
    if not known or any(_is_newer(path, indexed) for path in paths):
        _compare(folder, manifest, opened)
    # An index that is read-only keeps its time, and the files are looked at at every start.
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)


def verify_files(folder: Path, manifest: Manifest, places: Sequence[Place]) -> None:
    """Look at every file again and compare all rows, and bytes where they were hashed."""
    opened = open_places(places, fields_of(manifest).labels)
    verify_rows(folder, manifest, _compare(folder, manifest, opened))
    hashes = hash_images(manifest, _paths(folder, manifest, places))
    for entry in manifest["shards"]:
        if "bodies" in entry and next(hashes) != entry["bodies"]:
            raise changed(folder, f"the images of {entry['name']} have other bytes in them")


def hash_images(manifest: Manifest, paths: FilePaths) -> Iterator[str]:
    """Yield the hash of the image files that each shard would hold."""
    base = 0
    for entry in manifest["shards"]:
        digest = hashlib.blake2b(digest_size=16)
        for i in range(base, base + entry["samples"]):
            try:
                digest.update(read_file(paths[i]))
            except OSError as error:
                raise DataError(f"cannot read {paths[i]}: {error.strerror}.") from error
        base += entry["samples"]
        yield digest.hexdigest()


def _compare(folder: Path, manifest: Manifest, opened: Opened) -> list[Scan]:
    """Scan all files, and raise unless members and labels are those of the manifest."""
    pairs = list(scan_files(opened))
    scans = [scan for scan, _ in pairs]
    entries = [entry_of(one) for one in scans]
    if fingerprint(entries) != manifest["fingerprint"]:
        now = {file for _, files in pairs for file in files}
        raise changed(folder, _difference(folder, manifest, opened.places, now))
    labels = [(one["name"], one.get("labels")) for one in entries]
    before = [(one["name"], one.get("labels")) for one in manifest["shards"]]
    if labels != before or opened.images.labels.names != manifest.get("classes"):
        raise labels_changed(folder, str(opened.places[0].path))
    return scans


def _difference(folder: Path, manifest: Manifest, places: Sequence[Place], now: set[File]) -> str:
    """Return which files are gone, new, or of another size, or that the labels are others."""
    paths = _paths(folder, manifest, places)
    indexed = {paths.file(i) for i in range(len(paths))}
    for what, files in (("gone", indexed - now), ("new", now - indexed)):
        if files:
            names = listed(sorted(file.path for file in files))
            return f"{names} {'is' if len(files) == 1 else 'are'} {what}"
    sizes = load_column(folder, "sizes", len(paths))
    for i, path in enumerate(paths):
        with contextlib.suppress(OSError):
            if (size := path.stat().st_size) != sizes[i] and path.suffix.lower() in COPIED:
                return f"{path} had {sizes[i]} bytes and now has {size}"
    return f"{listed(str(place.path) for place in places)} have other labels"


def _paths(folder: Path, manifest: Manifest, places: Sequence[Place]) -> FilePaths:
    samples = sum(entry["samples"] for entry in manifest["shards"])
    return FilePaths(folder, roots_of(places), samples)


def _watched(folder: Path, manifest: Manifest, places: Sequence[Place]) -> Iterator[str]:
    """Yield the folders, lists, and files of class names that say which files there are."""
    roots = roots_of(places)
    try:
        for number, inner in json.loads((folder / WATCHED).read_bytes()):
            yield os.path.join(roots[number], inner)
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise damaged(folder, f"{WATCHED} cannot be read") from error
    yield from (str(place.path) for place in places if place.path.is_file())
    labels = fields_of(manifest).labels
    if os.path.isfile(labels):
        yield labels


def _is_newer(path: str | Path, indexed: int) -> bool:
    try:
        return os.stat(path).st_mtime_ns > indexed
    except OSError:
        return True  # gone, or out of reach
