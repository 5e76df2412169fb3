"""Pack images into shuffled WebDataset shards, and index them.

Shards are read in blocks from shared storage, so the shuffle at packing time makes the blocks
random. The same source, seed and arguments give the same bytes for any number of workers.

What is small is checked first: that OUT can be made, that the classes have names that can be
written. No image ends the packing. One that cannot be read or converted is left out and counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepclust.data.images.levels import Levels
from deepclust.data.owned_folder import owned, sweep
from deepclust.data.pack.blobs import Files
from deepclust.data.pack.classes import Labels, describe
from deepclust.data.pack.image_sources import ImageSource, SourceOptions
from deepclust.data.pack.names import storable
from deepclust.data.pack.order import shard_borders, shuffled
from deepclust.data.pack.several import Sources, listed_sources, open_sources, paths_of
from deepclust.data.pack.stored import Packer
from deepclust.data.pack.tally import shown
from deepclust.data.pack.write import Work, write_shards
from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.errors import DataError, DiskError, RecipeError
from deepclust.files import atomic_folder, temporary, write_json


@dataclass(frozen=True)
class PackOptions:
    """How images become shards.

    shard_size    largest number of samples of a shard: 10,000 by default, or less to make 16 shards
    workers       number of threads (for resize_short), which changes no byte
    resize_short  images whose shorter side is longer are reduced to it: JPEG and WebP become JPEG
                  of quality 92, PNG and PPM become PNG
    class_names   overrides the names that the source has
    classes       none, first, last, full or a file of names (`classes.py`), "" for the source's own
    range         auto, full or LOW:HIGH, for images of more than 8 bits (`levels.py`)
    """

    shard_size: int | None = None
    workers: int = 1
    seed: int = 0
    resize_short: int | None = None
    class_names: Sequence[str] | None = None
    classes: str = ""
    range: str = "auto"


def pack(
    source: Sources,
    out: str | Path,
    *,
    emit: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Index:
    """Write `out`/shard-000000.tar, ..., dataset.json and the index, and return the index.

    source        a form of `image_sources.py`: a folder, a list, a table, an archive, a data set;
                  or several of them, as `several.py` joins them
    out           a folder that does not exist yet, or is empty
    emit          is called with lines on the classes, and on what was left out, by reason
    options       the fields of `PackOptions`

    Images that are JPEG, PNG, WebP or PPM keep their bytes. One of these that cannot be decoded is
    packed as it is, and reported and excluded at extraction. Other formats become PNG, and one that
    cannot be converted is left out. Raises DataError for a source without images, and DiskError.
    """
    asked = PackOptions(**options)
    _check_positive(asked)
    out = _checked_out(Path(out))
    packer = Packer(Levels.parse(asked.range))
    with contextlib.ExitStack() as opened:
        files = Files(out.parent, opened)
        images, parts = open_sources(source, SourceOptions(asked.classes, packer, files))
        _pack(images, source, out, asked, emit, paths_of(parts))
    index = open_index(out)
    for i, reason in index.excluded.items():
        packer.notes.add(f"packed, but excluded by the index: {reason}", index.keys[i])
    for line in _lost(packer):
        emit(line)
    return index


def _pack(
    images: ImageSource,
    source: Sources,
    out: Path,
    asked: PackOptions,
    emit: Callable[[str], None],
    paths: Sequence[str | None],
) -> None:
    """Write the shards of an opened source, or nothing."""
    packer = images.packer
    labels = _named(images.labels, asked.class_names)
    for line in (*_leftovers(out), *describe(labels)):
        emit(line)
    order = shuffled(len(labels.numbers), asked.seed)
    work = Work(images, order, asked.resize_short, paths, emit)
    texts = [storable(str(one)) for one in listed_sources(source)]
    about: dict[str, Any] = {
        "class_names": labels.names,
        "source": texts[0] if len(texts) == 1 else texts,
    }
    about |= {"seed": asked.seed, "resize_short": asked.resize_short}

    def fill(folder: Path) -> None:
        with owned(folder):
            write_json(folder / "dataset.json", about)  # the small file first
            write_shards(work, folder, shard_borders(len(order), asked.shard_size), asked.workers)
            if packer.left:
                write_json(folder / "dataset.json", about | {"left_out": packer.left.as_dict()})
            build_index(folder)

    atomic_folder(out, fill, before=lambda: _refuse_existing(out))


def _named(labels: Labels, names: Sequence[str] | None) -> Labels:
    """Return the labels with the names that were asked for, if there are enough of them."""
    labels = labels if names is None else Labels(labels.numbers, list(names))
    largest = int(labels.numbers.max(initial=-1))
    if labels.names is not None and largest >= len(labels.names):
        raise DataError(
            f"there are {len(labels.names)} class names, but labels reach {largest}. "
            "Correct them, or give --classes none."
        )
    return labels


def _lost(packer: Packer) -> list[str]:
    """Return the lines on what is not in the shards, or not as it was."""
    total = packer.left.total()
    title = [f"left out: {total} file{'' if total == 1 else 's'}"] if total else []
    return [*title, *(f"  {line}" for line in packer.left.lines()), *packer.notes.lines()]


def _check_positive(options: PackOptions) -> None:
    for name in ("shard_size", "workers", "resize_short"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"{name} must be at least 1, not {value}.")


def _checked_out(out: Path) -> Path:
    """Return the full path of a folder that can be made, or of an empty one, without its links."""
    out = out.absolute()
    try:
        if out.is_symlink() and not out.exists():
            raise DataError(f"{out} is a link to nothing. Choose another folder, or delete it.")
        out = out.resolve() if out.is_symlink() else out
        _refuse_existing(out)
        str(out).encode()  # pyarrow takes no other name
        probe = temporary(out)
        probe.mkdir(parents=True)
        probe.rmdir()
    except UnicodeEncodeError as error:
        raise DataError(f"{shown(str(out))} is not UTF-8. Choose another folder.") from error
    except OSError as error:
        raise DiskError(f"cannot make {out}: {error.strerror}. Choose another folder.") from error
    return out


def _refuse_existing(out: Path) -> None:
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise DataError(f"{out} exists already. Choose another folder, or delete it first.")


def _leftovers(out: Path) -> list[str]:
    """Delete what a killed `pack` to the same place has left; return a line for each that stays."""
    return [
        f"note: {shown(str(folder))} is of a `pack` that was stopped, unless another one writes "
        "there now. Delete it to free its space"
        for folder in sweep(out)
    ]
