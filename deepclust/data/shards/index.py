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
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt32, UInt64

from deepclust.data.loose.find import places_of
from deepclust.data.shards import index_build, summary
from deepclust.data.shards.check import (
    LabelsChangedError,
    check_columns,
    check_shards,
    load_column,
)
from deepclust.data.shards.check import (
    verify as verify_index,
)
from deepclust.data.shards.fields import DEFAULT, NONE, Fields, fields_from
from deepclust.data.shards.file_lock import held
from deepclust.data.shards.find import (
    Shards,
    beside,
    common_folder,
    described,
    expand,
    is_folder,
    numbered,
)
from deepclust.data.shards.keys import Keys
from deepclust.data.shards.left_out import Tally, shown
from deepclust.data.shards.manifest import (
    FOLDER,
    MANIFEST,
    Manifest,
    fields_of,
    read_manifest,
)
from deepclust.data.shards.remote import fetch
from deepclust.data.shards.url import Source, Url, names_of
from deepclust.errors import DataError, MissingError, RecipeError
from deepclust.files import check_utf8

_OTHER_CLASSES = (
    "their folders have different class names (dataset.json), so that a number is not one class. "
    "Pack the sources together: `deepclust pack SRC SRC OUT`"
)


class Location(NamedTuple):
    """Positions of images: shard ordinals, byte offsets and byte sizes, each int64 [m]."""

    shard: Int64[np.ndarray, " m"]
    offset: Int64[np.ndarray, " m"]
    size: Int64[np.ndarray, " m"]


class Index:
    """An opened index: memory-mapped columns by sample id, cheap to open and to pickle.

    `names` are the shards' names, `lengths` their sizes in bytes, `excluded` the reasons by sample
    id.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[Source],
        manifest: Manifest | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Map the columns of the index in `folder` without opening the shards.

        `numbers` say by which of the sources of `data.shards` each shard was given.
        """
        manifest = read_manifest(folder) if manifest is None else manifest
        self.folder, self.shards, self.manifest = folder, shards, manifest
        self.fingerprint = manifest["fingerprint"]
        self.excluded = {int(i): reason for i, reason in manifest["excluded"].items()}
        self._numbers = numbers or [0] * len(shards)
        self.names = [shard["name"] for shard in manifest["shards"]]
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

    def __repr__(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"Index({len(self):,} samples in {len(self.shards):,} shards{classes})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the paths only: a worker process opens the files again."""
        return Index, (self.folder, self.shards)

    @property
    def origin(self) -> str:
        """Where the images lie, for messages."""
        return str(self.shards[0].parent)

    @property
    def source_ids(self) -> Int64[np.ndarray, " n"]:
        """The number of the source of `data.shards` that each sample comes from."""
        return np.repeat(np.array(self._numbers, np.int64), np.diff(self.bases))

    def copied_to(self, shards: list[Source]) -> Index:
        """Return the same index over copies of the shards."""
        return Index(self.folder, shards, self.manifest, self._numbers)

    @cached_property
    def keys(self) -> Keys:
        """The samples' keys, read when first used."""
        return Keys(self.folder, self.bases)

    @cached_property
    def class_names(self) -> list[str] | None:
        """The names of the labels, from the dataset.json next to the shards, if there is one.

        Where there is none beside all, it is that of the folders, which `open_index` compares.
        """
        if (named := self.manifest.get("classes")) is not None:
            return named
        path = common_folder(self.shards) / "dataset.json"
        names = _class_names(path)
        if names is None and (tables := _tables_of(self.shards)):
            (names,) = tables[:1]
        if names is not None and self.labels is not None and self.labels.max() >= len(names):
            raise DataError(
                f"{path} names {len(names)} classes, but labels reach {self.labels.max()}. "
                "Correct its class_names, or delete it."
            )
        return names

    def notes(self, labels: bool = True) -> list[str]:
        """Return what was left out, by reason with examples, and with `labels` what has none."""
        return summary.notes(self.manifest, self.keys, labels=labels)

    def locate(self, sample_ids: Integer[np.ndarray, " m"]) -> Location:
        """Return where the images of these samples are (size 0 for excluded samples)."""
        ids = np.asarray(sample_ids, np.int64)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self)), "no such sample id"
        shard = np.searchsorted(self.bases, ids, side="right") - 1
        return Location(shard, self.offsets[ids].astype(np.int64), self.sizes[ids].astype(np.int64))

    def where(self, sample: int) -> str:
        """Return a sample's shard, key and offset, for messages."""
        shard, offset, _ = self.locate(np.array([sample]))
        name = shown(self.names[int(shard[0])])
        return f"{name}, key {self.keys[sample]!r}, offset {int(offset[0])}"

    def _column(self, name: str) -> np.ndarray:
        return load_column(self.folder, name, len(self))


class _DoubledKey(ValueError):
    """An object has a key twice, and the last would win in silence."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if doubled := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise _DoubledKey(f"the key {doubled[0]!r} stands twice in one object")
    return dict(pairs)


def _tables_of(shards: Sequence[Source]) -> list[list[str]]:
    """Return the tables of class names that the folders of the shards have, each once."""
    folders = sorted({shard.parent for shard in shards if isinstance(shard, Path)})
    tables = [_class_names(folder / "dataset.json") for folder in folders] if folders[1:] else []
    return [table for i, table in enumerate(tables) if table and table not in tables[:i]]


def _class_names(path: Source) -> list[str] | None:
    """Return the class names of a dataset.json, or None if it is missing or has none."""
    try:
        about = json.loads(fetch(path) or b"{}", object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        why = f" ({error})" if isinstance(error, _DoubledKey) else ""
        raise DataError(f"{path} is not JSON{why}. Correct it, or delete it.") from error
    names = about.get("class_names") if isinstance(about, dict) else 0
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        raise DataError(f"{path} has no list class_names of texts. Correct it, or delete it.")
    return names


def open_index(
    shards: Shards,
    index: str | Path | None = None,
    run_dir: Path | None = None,
    *,
    image: str = DEFAULT.image,
    labels: str = DEFAULT.labels,
    build: bool = True,
) -> Index:
    """Open the index of shards (`find.expand`) or image files, and build it if there is none.

    The index is the folder `index`, if that is given, else a folder next to the shards. Its name is
    `deepclust-index` for all *.tar of one folder, and `deepclust-index-<8 hex digits>` for some, or
    for another `image` or `labels` (`fields.py`). For URLs it is `index`, or `run_dir / "index"`,
    and one that was uploaded next to them is copied. Changed labels are read again. Without `build`
    nothing is written: a MissingError or a LabelsChangedError. Image files: `loose/index.py`.

    Raises DataError if names or sizes are others, or the index is damaged, and as `build_index`.
    """
    if (places := places_of(shards, index)) is not None:
        from deepclust.data.loose.index import open_files  # it imports this file

        return open_files(places, index, Fields(image, labels), build=build)
    pairs, fields = numbered(shards), fields_from(image, labels)
    sources = [shard for shard, _ in pairs]
    folder = _place(shards, sources, fields, index, run_dir)
    if not (folder / MANIFEST).exists():
        _refuse_missing(folder, shards, build)
        _make(folder, shards, sources, fields)
    manifest = _checked(folder, sources, fields)
    try:
        check_shards(folder, manifest, sources)
    except LabelsChangedError as error:
        if not build:
            raise
        if fields.labels != NONE:
            manifest = _read_labels_again(folder, shards, sources, error)
    wanted = _with_wanted_labels(manifest, fields, sources)
    return Index(folder, sources, wanted, [number for _, number in pairs])


def _refuse_missing(folder: Path, shards: Shards, build: bool) -> None:
    if not build:
        raise MissingError(
            f"{described(shards)} has no index in {folder}. `deepclust index SHARDS` writes it."
        )


def _with_wanted_labels(manifest: Manifest, fields: Fields, sources: list[Source]) -> Manifest:
    """Return a manifest without labels where none are wanted, or where numbers are no classes."""
    if fields.labels == NONE:
        return {**manifest, "labelled": False, "unlabelled": {}}
    if manifest["labelled"] and "classes" not in manifest and len(_tables_of(sources)) > 1:
        note = f"the labels in {common_folder(sources)} are left out: {_OTHER_CLASSES}"
        return {**manifest, "labelled": False, "notes": [note]}
    return manifest


def build_index(
    shards: Shards,
    index: str | Path | None = None,
    *,
    verify: bool = False,
    bodies: bool = False,
    image: str = DEFAULT.image,
    labels: str = DEFAULT.labels,
) -> Index:
    """Scan all shards and write their index in place of an old one.

    With `bodies` all bytes of the shards are hashed too. With `verify` nothing is written. Every
    header and label is read again and compared with the rows of the index, and bytes with their
    hashes where there are some. A DataError says what is not as it was.

    Raises DataError for broken shards (see `scan.scan`) and when no sample has an image. Raises
    DiskError when the index cannot be written.
    """
    if (places := places_of(shards, index)) is not None:
        from deepclust.data.loose.index import build_files  # it imports this file

        asked = Fields(image, labels)
        return build_files(places, index, asked, verify=verify, bodies=bodies)
    sources, fields = expand(shards), fields_from(image, labels)
    folder = _place(shards, sources, fields, index)
    if not verify:
        index_build.write(folder, sources, fields, beside(shards), replace=True, bodies=bodies)
        return Index(folder, sources)
    manifest = _checked(folder, sources, fields)
    check_shards(folder, manifest, sources)
    verify_index(folder, manifest, sources)
    return Index(folder, sources, manifest)


def _checked(folder: Path, sources: list[Source], fields: Fields) -> Manifest:
    """Return the manifest of an index that is whole and was made for these fields."""
    try:
        manifest = read_manifest(folder)
        check_columns(folder, manifest)
    except DataError:  # another process may have written it again meanwhile
        manifest = read_manifest(folder)
        check_columns(folder, manifest)
    made = fields_of(manifest)
    if made.image != fields.image or (fields.labels != NONE and made.labels != fields.labels):
        raise DataError(
            f"the index {folder} was made with data.image={made.image} data.labels={made.labels}, "
            f"not data.image={fields.image} data.labels={fields.labels}: set data.index to another "
            "folder, or write it again with `deepclust index SHARDS --image I --labels L`."
        )
    return manifest


def _read_labels_again(
    folder: Path, shards: Shards, sources: list[Source], error: LabelsChangedError
) -> Manifest:
    """Write an index again whose members are the same, and whose labels are not."""
    with held(folder.with_name(f".{folder.name}.lock"), "indexes the shards"):
        manifest = read_manifest(folder)
        try:
            check_shards(folder, manifest, sources)
        except LabelsChangedError:
            logging.getLogger("deepclust").warning("%s They are read again now.", error)
            before, fields = manifest["fingerprint"], fields_of(manifest)
            index_build.write(folder, sources, fields, beside(shards), replace=True)
            manifest = read_manifest(folder)
            if manifest["fingerprint"] != before:
                raise DataError(f"the shards of {folder} changed while they were read.") from error
    return manifest


def _make(folder: Path, shards: Shards, sources: list[Source], fields: Fields) -> None:
    if isinstance(sources[0], Path):
        index_build.write(folder, sources, fields, beside(shards), replace=False)
        return
    # All bytes of remote shards are read, so one process does it for all.
    with held(folder.with_name(f".{folder.name}.lock"), "indexes the shards"):
        if (folder / MANIFEST).exists() or index_build.copy_remote(folder, sources, fields):
            return
        index_build.write(folder, sources, fields, Tally(), replace=False)


def _place(
    shards: Shards,
    sources: list[Source],
    fields: Fields,
    index: str | Path | None,
    run_dir: Path | None = None,
) -> Path:
    """Return the folder of the index of `sources`, which `shards` was expanded to."""
    folder = _named(shards, sources, fields, index, run_dir)
    check_utf8(folder, "an index")
    return folder


def _named(
    shards: Shards,
    sources: list[Source],
    fields: Fields,
    index: str | Path | None,
    run_dir: Path | None,
) -> Path:
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
    usual = folder / _name(shards, sources, folder)
    if fields == DEFAULT or (fields == Fields(labels=NONE) and (usual / MANIFEST).exists()):
        return usual
    words = repr((usual.name, *fields)).encode()
    return folder / f"{FOLDER}-{hashlib.blake2b(words, digest_size=4).hexdigest()}"


def _name(shards: Shards, sources: list[Source], folder: Path) -> str:
    """Return the name of an index: what a pattern names may be all of its folder, or a part."""
    if is_folder(shards) or (
        all(source.parent == folder for source in sources) and sources == expand(folder)
    ):
        return FOLDER
    names = "\n".join(names_of(sources)).encode()
    return f"{FOLDER}-{hashlib.blake2b(names, digest_size=4).hexdigest()}"
