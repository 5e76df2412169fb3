"""The index of image files that are read where they lie: the door for folders and lists.

It is the index of the shards that `pack` would make of them, and has their names. The paths of the
files are beside its columns, and the offset of each image is 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from deepclust.data.loose.changes import WATCHED, check_unchanged, hash_images, verify_files
from deepclust.data.loose.files import FilePaths, write_paths
from deepclust.data.loose.find import Place
from deepclust.data.loose.source import (
    Opened,
    check_labels,
    open_places,
    roots_of,
    scan_files,
)
from deepclust.data.pack.classes import describe
from deepclust.data.shards import index_build
from deepclust.data.shards.check import LabelsChangedError, check_columns
from deepclust.data.shards.fields import AUTO, NONE, Fields
from deepclust.data.shards.file_lock import held
from deepclust.data.shards.index import Index, Location
from deepclust.data.shards.left_out import Tally, listed
from deepclust.data.shards.manifest import (
    FOLDER,
    MANIFEST,
    Manifest,
    fields_of,
    read_manifest,
)
from deepclust.data.shards.scan import Scan
from deepclust.data.shards.url import Source
from deepclust.errors import DataError, DiskError, MissingError, RecipeError
from deepclust.files import write_json

_WARNING = "warning: "
log = logging.getLogger("deepclust")


class FileIndex(Index):
    """An opened index of image files: `paths` are theirs, by sample id."""

    def __init__(
        self, folder: Path, places: Sequence[Place], manifest: Manifest | None = None
    ) -> None:
        """Map the columns of the index in `folder` without opening the images."""
        manifest = read_manifest(folder) if manifest is None else manifest
        root = _common_root(places)
        shards: list[Source] = [root / entry["name"] for entry in manifest["shards"]]
        super().__init__(folder, shards, manifest)
        self.places = list(places)
        self.paths = FilePaths(folder, roots_of(places), len(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the paths only: a worker process opens the files again."""
        return FileIndex, (self.folder, self.places)

    @cached_property
    def class_names(self) -> list[str] | None:
        """The names of the labels, if they have names."""
        return self.manifest.get("classes")

    def locate(self, sample_ids: Integer[np.ndarray, " m"]) -> Location:
        """Return where the images of these samples are: file i, from its first byte on."""
        ids = np.asarray(sample_ids, np.int64)
        return Location(ids, *super().locate(ids)[1:])

    def where(self, sample: int) -> str:
        """Return a sample's file and key, for messages."""
        return f"{self.paths[sample]}, key {self.keys[sample]!r}"

    @property
    def origin(self) -> str:
        """Where the images lie, for messages."""
        return _shown(self.places)

    @property
    def source_ids(self) -> Int64[np.ndarray, " n"]:
        """The number of what was given as `data.shards` that each sample comes from."""
        sources = np.array([place.source for place in self.places], np.int64)
        return np.take(sources, self.paths.roots)


def open_files(
    places: Sequence[Place], index: str | Path | None, asked: Fields, *, build: bool
) -> FileIndex:
    """Open the index of image files, as `shards.index.open_index` does that of shards."""
    labels = _labels(asked)
    folder = _folder(places, index, labels)
    if not (folder / MANIFEST).exists():
        if not build:
            raise MissingError(f"{_shown(places)} have no index in {folder}")
        folder = _make(places, index, labels)
    manifest = _checked(folder, labels)
    try:
        check_unchanged(folder, manifest, places)
    except LabelsChangedError as error:
        if not build:
            raise
        if labels != NONE:
            log.warning("%s They are read again now.", error)
            write(folder, open_places(places, labels), labels, replace=True)
            manifest = read_manifest(folder)
    if labels == NONE:
        manifest = {**manifest, "labelled": False, "unlabelled": {}}
    return FileIndex(folder, places, manifest)


def build_files(
    places: Sequence[Place], index: str | Path | None, asked: Fields, *, verify: bool, bodies: bool
) -> FileIndex:
    """Write the index of image files again, or `verify` it, as `shards.index.build_index` does."""
    labels = _labels(asked)
    folder = _folder(places, index, labels)
    if not verify:
        write(folder, open_places(places, labels), labels, replace=True, bodies=bodies)
        return FileIndex(folder, places)
    manifest = _checked(folder, labels)
    verify_files(folder, manifest, places)
    return FileIndex(folder, places, manifest)


def write(
    folder: Path, opened: Opened, labels: str, *, replace: bool, bodies: bool = False
) -> None:
    """Write the index of opened image files; `labels` are those that they were opened with."""

    def fill(partial: Path) -> None:
        write_json(partial / WATCHED, opened.watched)
        manifest = index_build.fill(
            partial, _scans(partial, opened), Fields(labels=labels), Tally()
        )
        names, packer = opened.images.labels.names, opened.images.packer
        manifest["fields"] = Fields(labels=labels)._asdict()
        manifest["files"] = {"digest": opened.digest}
        manifest["left_out"] = packer.left.with_examples()
        warnings = [line for line in describe(opened.images.labels) if line.startswith(_WARNING)]
        notes = [line.removeprefix(_WARNING) for line in warnings]
        manifest["notes"] = [*notes, *packer.notes.lines()]
        if names is not None:
            manifest["classes"] = names
        if bodies:
            samples = sum(entry["samples"] for entry in manifest["shards"])
            paths = FilePaths(partial, roots_of(opened.places), samples)
            for entry, digest in zip(manifest["shards"], hash_images(manifest, paths), strict=True):
                entry["bodies"] = digest
        index_build.save(partial, manifest)

    index_build.put(folder, fill, replace=replace)


def _scans(folder: Path, opened: Opened) -> Iterator[Scan]:
    """Yield the scans, and write the paths after the last one."""
    files = []
    for scan, own in scan_files(opened):
        files += own
        yield scan
    write_paths(folder, files, several=len(opened.places) > 1)


def _make(places: Sequence[Place], index: str | Path | None, labels: str) -> Path:
    """Write an index, and return its folder; without labels where `none` are wanted or readable."""
    usual = _folder(places, index, labels)
    with _alone(usual, places):
        if (usual / MANIFEST).exists():
            return usual
        if labels != NONE:
            write(usual, open_places(places, labels), labels, replace=False)
            return usual
        # the ids and the fingerprint of those who read the labels, if they can be read
        try:
            opened = open_places(places, AUTO)
        except DataError:
            folder = _named_folder(places, index, NONE)
            write(folder, open_places(places, NONE), NONE, replace=False)
            return folder
        write(usual, opened, AUTO, replace=False)
        return usual


@contextlib.contextmanager
def _alone(folder: Path, places: Sequence[Place]) -> Iterator[None]:
    """Let one process index, before which a disk that refuses is known."""
    with contextlib.ExitStack() as stack:
        try:
            lock = held(folder.with_name(f".{folder.name}.lock"), f"indexes {_shown(places)}")
            stack.enter_context(lock)
        except DiskError as error:
            raise DiskError(f"{error} {index_build.ELSEWHERE}") from error
        yield


def _labels(asked: Fields) -> str:
    """Return `data.labels`; raise RecipeError for what image files do not have."""
    if asked.image != AUTO:
        raise RecipeError(
            f"data.image={asked.image} names a member of each sample in a tar, and these are image "
            "files: leave it at auto."
        )
    check_labels(asked.labels)
    return asked.labels


def _checked(folder: Path, labels: str) -> Manifest:
    """Return the manifest of an index that is whole and has these labels."""
    manifest = read_manifest(folder)
    check_columns(folder, manifest)
    made = fields_of(manifest).labels
    if labels not in (NONE, made):
        raise DataError(
            f"the index {folder} was made with data.labels={made}, not {labels}: set data.index to "
            f"another folder, or write it again: `deepclust index PLACE --labels {labels}`."
        )
    return manifest


def _folder(places: Sequence[Place], index: str | Path | None, labels: str) -> Path:
    """Return the folder of the index: with `none` that of all labels, unless it has its own."""
    own = _named_folder(places, index, labels)
    return own if labels != NONE or own.exists() else _named_folder(places, index, AUTO)


def _named_folder(places: Sequence[Place], index: str | Path | None, labels: str) -> Path:
    if index is not None:
        return Path(index).absolute()
    root = _common_root(places)
    if len(places) == 1 and places[0].path.is_dir() and labels == AUTO:
        return root / FOLDER
    names = [os.path.relpath(place.path, root) for place in places]
    words = repr((names, labels)).encode(errors="surrogateescape")
    return root / f"{FOLDER}-{hashlib.blake2b(words, digest_size=4).hexdigest()}"


def _common_root(places: Sequence[Place]) -> Path:
    return Path(os.path.commonpath(roots_of(places)))


def _shown(places: Sequence[Place]) -> str:
    return listed(str(place.path) for place in places)
