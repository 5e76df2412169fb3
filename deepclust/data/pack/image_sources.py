"""The sources that `deepclust pack` reads: what each is called, and what opens it.

DIR                              image files below a folder, or the .parquet files in it
FILE.txt, .lst, .csv, .tsv       a list of image files, with labels or without (`lists.py`)
FILE.parquet                     images or paths in a table (`parquet.py`)
FILE.zip, .tar, .tar.gz, ...     image files in an archive (`archives.py`)
idx:DIR/train                    DIR/train-images-idx3-ubyte[.gz] and its labels (LeCun's format)
torchvision:CIFAR10:train@ROOT   a torchvision data set, downloaded to ROOT when absent
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from deepclust.data.pack import archives, idx, lists, parquet, torchvision_sets
from deepclust.data.pack.blobs import Files, read_file
from deepclust.data.pack.classes import Labels, check_classes, labels_by_folder, read_names
from deepclust.data.pack.names import keys_of
from deepclust.data.pack.stored import Packer, png
from deepclust.data.pack.tally import Tally
from deepclust.data.pack.walk import CONVERTED, COPIED, walk
from deepclust.errors import DataError

_BY_FOLDER = ("first", "last", "full")


@dataclass(frozen=True)
class ImageSource:
    """Images to pack: `read(i)` returns image i's extension and bytes.

    It raises `LeftOutError` for an image that `packer` has counted as left out. Where images are
    files of their own, `files` has their paths, relative to `folder`. `walked` are the folders that
    were listed.
    """

    labels: Labels
    read: Callable[[int], tuple[str, bytes]]
    keys: list[str] | None = None  # None: the packer numbers them
    packer: Packer = field(default_factory=Packer)
    files: Sequence[str] = ()
    folder: Path | None = None
    walked: Sequence[str] = ()


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read: the rule for classes ("" for the source's own), and for values.

    `files` are those that stay open, and the place for a copy of what is compressed. `in_place`
    says that images have to be files of their own.
    """

    classes: str = ""
    packer: Packer = field(default_factory=Packer)
    files: Files = field(default_factory=Files)
    in_place: bool = False


def open_source(source: str | Path, options: SourceOptions | None = None) -> ImageSource:
    """Open a source in one of the forms above, or raise DataError."""
    text, options = os.fspath(source), options or SourceOptions()
    if options.classes:
        check_classes(options.classes)
    for prefix, opener in _PREFIXES.items():
        if text.startswith(prefix):
            _refuse_in_place(text, options)
            return _relabelled(opener(text.removeprefix(prefix), options), options.classes)
    if not text:
        raise DataError("the source has no name, and the current folder is '.'. Give a folder.")
    path = Path(text)
    if not os.path.isdir(path):  # false, too, for a name that no disk can have
        for suffixes, open_file in _FILES:
            if path.name.lower().endswith(suffixes):
                return open_file(path, options)
    return _folder(path, options)


def _refuse_in_place(source: str | Path, options: SourceOptions) -> None:
    if options.in_place:
        raise DataError(
            f"the images of {source} are not files of their own. Make shards of them first: "
            f"`deepclust pack {source} OUT`, then data.shards=OUT."
        )


def _relabelled(source: ImageSource, classes: str) -> ImageSource:
    """Return a source without folders with other names of its classes, or without labels."""
    numbers = source.labels.numbers
    if classes in _BY_FOLDER or not classes:
        return source
    if classes == "none":
        return replace(source, labels=Labels(np.full_like(numbers, -1), None))
    return replace(source, labels=Labels(numbers, read_names(Path(classes))))


def _of_files(
    files: Sequence[str],
    read: Callable[[int], bytes],
    labels: Labels,
    packer: Packer,
) -> ImageSource:
    keys = keys_of([lists.relative(file) for file in files], packer.notes)

    def member(i: int) -> tuple[str, bytes]:
        return packer.member(files[i], lambda: read(i))

    return ImageSource(labels, member, keys, packer)


def _in(
    folder: Path,
    files: Sequence[str],
    labels: Labels,
    packer: Packer,
    walked: Sequence[str] = (),
) -> ImageSource:
    """Return the source of image files with these paths, relative to a folder."""
    source = _of_files(files, lambda i: read_file(folder / files[i]), labels, packer)
    return replace(source, files=files, folder=folder, walked=walked)


def _folder(folder: Path, options: SourceOptions) -> ImageSource:
    walked: list[str] = []
    files = walk(folder, left := Tally(), walked)
    if not files and (tables := sorted(folder.rglob("*.parquet"))):
        return _tables(tables, options)  # the walk has counted them as left out
    options.packer.left.merge(left)
    if not files:
        raise _no_images(folder, options, _advice(folder))
    labels = labels_by_folder(files, options.classes or "first")
    return _in(folder.absolute(), files, labels, options.packer, walked)


def _no_images(source: Path, options: SourceOptions, advice: str = "") -> DataError:
    left = options.packer.left.lines()
    rest = f" Left out: {', '.join(left[:_REASONS])}." if left else ""
    return DataError(f"no images below {source}.{rest} {advice}".rstrip())


def _advice(folder: Path) -> str:
    files = sorted(folder.glob("*-images-idx?-ubyte*"))
    if files:
        return f"It holds idx files: pack 'idx:{folder / files[0].name.partition('-images')[0]}'."
    return f"Images end in {', '.join(sorted(COPIED | CONVERTED))}."


def _list(path: Path, options: SourceOptions) -> ImageSource:
    rows = lists.read_list(path)
    files = [row.file for row in rows]
    labels = _labels(files, [row.label for row in rows], options)
    return _in(path.absolute().parent, files, labels, options.packer)


def _labels(files: list[str], words: list[str], options: SourceOptions) -> Labels:
    """Label the rows of a list by their words, or by the folders of their paths if asked to."""
    if options.classes == "none" or options.classes in _BY_FOLDER:
        return labels_by_folder([lists.relative(file) for file in files], options.classes)
    return lists.labels_of(words, files, options.classes, options.packer.notes)


def _table(path: Path, options: SourceOptions) -> ImageSource:
    return _tables([path], options)


def _tables(paths: list[Path], options: SourceOptions) -> ImageSource:
    if parquet.holds_images(paths[0]):
        _refuse_in_place(paths[0], options)
    table = parquet.read_parquet(paths, options.packer.left, options.files)
    if not table.files:
        raise _no_images(paths[0], options)
    if len({path.name.partition("-")[0] for path in paths}) > 1:
        for path in paths:
            options.packer.notes.add("tables packed as one, though they may be splits", path.name)
    labels = _labels(table.files, table.words, options)
    if labels.names is None and table.class_names and options.classes != "none":
        labels = Labels(labels.numbers, table.class_names)
    if table.blobs is None:
        return _in(paths[0].absolute().parent, table.files, labels, options.packer)
    return _of_files(table.files, table.blobs.read, labels, options.packer)


def _zip(path: Path, options: SourceOptions) -> ImageSource:
    _refuse_in_place(path, options)
    return _archive(path, *archives.zip_images(path, options.packer.left, options.files), options)


def _tar(path: Path, options: SourceOptions) -> ImageSource:
    _refuse_in_place(path, options)
    images = archives.tar_images(path, options.packer.left, options.files)
    return _archive(path, *images, options)


def _archive(
    path: Path, files: list[str], read: Callable[[int], bytes], options: SourceOptions
) -> ImageSource:
    if not files:
        raise _no_images(path, options)
    tops = {file.partition("/")[0] for file in files}
    is_wrapped = len(tops) == 1 and all(file.count("/") >= 2 for file in files)
    inner = [file.partition("/")[2] if is_wrapped else file for file in files]
    return _of_files(
        files, read, labels_by_folder(inner, options.classes or "first"), options.packer
    )


def _idx(prefix: str, options: SourceOptions) -> ImageSource:
    images, labels = idx.read_idx(Path(prefix))
    if labels is None:
        options.packer.notes.add("without a file of labels", prefix)
    numbers = np.full(len(images), -1, np.int32) if labels is None else labels
    return ImageSource(
        Labels(numbers, None),
        lambda i: ("png", png(Image.fromarray(images[i]))),
        packer=options.packer,
    )


def _torchvision(words: str, options: SourceOptions) -> ImageSource:
    data = torchvision_sets.open_set(words)
    labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels)
    return ImageSource(
        Labels(labels.astype(np.int32), list(data.classes) if hasattr(data, "classes") else None),
        lambda i: ("png", png(data[i][0])),
        packer=options.packer,
    )


_REASONS = 5  # that a message names
_PREFIXES: dict[str, Callable[[str, SourceOptions], ImageSource]] = {
    "idx:": _idx,
    "torchvision:": _torchvision,
}
_FILES: list[tuple[tuple[str, ...], Callable[[Path, SourceOptions], ImageSource]]] = [
    ((*lists.TEXTS, *lists.TABLES), _list),
    ((".parquet",), _table),
    ((".zip",), _zip),
    (archives.TARS, _tar),
]
