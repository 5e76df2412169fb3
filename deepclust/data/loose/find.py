"""Which places that are given as shards hold image files instead: folders, and lists."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from deepclust.data.loose.files import PATHS
from deepclust.data.pack import archives, lists
from deepclust.data.pack.walk import has_images
from deepclust.data.shards.find import Shards, choices, described, has_shards, texts
from deepclust.data.shards.manifest import FOLDER
from deepclust.data.shards.url import is_url
from deepclust.errors import DataError

LISTS = (*lists.TEXTS, *lists.TABLES, ".parquet")
ARCHIVES = (".zip", *(suffix for suffix in archives.TARS if suffix != ".tar"))


class Place(NamedTuple):
    """A folder or list of image files, and the number of what it was given by."""

    path: Path
    source: int


def places_of(shards: Shards, index: str | Path | None = None) -> list[Place] | None:
    """Return the folders and lists of image files, or None for shards.

    A folder that holds a *.tar, in itself or below, is one of shards. Where an index of image files
    is, there is no search. Raises DataError for both kinds together, and for an archive.
    """
    given = [(i, name) for i, text in enumerate(texts(shards)) for name in choices(text)]
    known = index is not None and (Path(index) / PATHS).is_file()
    loose = [Place(Path(name), i) for i, name in given if known or _holds_files(name)]
    if loose and len(loose) < len(given):
        raise DataError(
            f"{described(shards)}: some are shards, and some are image files ({loose[0].path}). "
            f"Make shards of these: `deepclust pack {loose[0].path} OUT`."
        )
    return loose or None


def _holds_files(text: str) -> bool:
    path = Path(text)
    if is_url(text):
        return False
    try:
        if path.is_dir():
            return _is_indexed(path) or (not has_shards(path) and has_images(path))
        if path.name.lower().endswith(ARCHIVES) and path.is_file():
            raise DataError(
                f"{path} is an archive, and samples are read by their offset in plain tars. Make "
                f"shards of it: `deepclust pack {path} OUT`. A tar of shards is unpacked first."
            )
        return path.name.lower().endswith(LISTS) and path.is_file()
    except DataError:  # a ValueError, too
        raise
    except (OSError, ValueError):
        return False  # `find.expand` says what is wrong


def _is_indexed(folder: Path) -> bool:
    return (folder / FOLDER / PATHS).is_file()
