"""The image files below a folder, and a count of all that is left out.

A file is an image by its extension, or else by its first bytes. Links to files are read, links to
folders are followed once. Nothing but a folder that cannot be listed ends the walk.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from deepclust.data.images.formats import HEAD, sniff
from deepclust.data.pack.tally import Tally
from deepclust.data.shards.manifest import FOLDER
from deepclust.errors import DataError

COPIED = {".jpg", ".jpeg", ".png", ".webp", ".ppm"}  # byte for byte
CONVERTED = {".bmp", ".gif", ".pgm", ".tif", ".tiff", ".avif", ".jp2", ".heic", ".heif"}  # to PNG
# They begin like a TIFF or a HEIC, and what Pillow would read is a thumbnail.
_RAW = {".cr2", ".cr3", ".nef", ".dng", ".arw", ".orf", ".rw2", ".pef", ".srw", ".raf", ".3fr"}

# our own: the index of an image folder, its lock, and a folder that is becoming one
_INDEX = re.compile(rf"\.?{FOLDER}(-[0-9a-f]{{8}})?(\.lock|\..*\.tmp)?")


def is_image(file: str, head: Callable[[], bytes], tally: Tally) -> bool:
    """Return whether a file is an image; one that is left out is counted with the reason.

    `head` returns its first bytes, and is called for unknown extensions alone.
    """
    name = posixpath.basename(file)
    extension = posixpath.splitext(name)[1].lower()
    if name.startswith("."):
        tally.add("hidden", file)
    elif extension in COPIED | CONVERTED:
        return True
    elif extension in _RAW:
        tally.add(f"{extension}, raw camera files: convert them first", file)
    elif sniff(head()) is None:
        tally.add(extension if 0 < len(extension) <= 12 else "without an image's name", file)
    else:
        return True
    return False


def walk(folder: Path, tally: Tally, walked: list[str] | None = None) -> list[str]:
    """Return the relative POSIX paths of the images below a folder, sorted.

    `walked` is given the relative path of every folder that was listed. Raises DataError for a
    folder that cannot be listed.
    """
    if not os.path.isdir(folder):
        raise DataError(
            f"no folder {folder} to pack. Give an image folder, a list (.txt, .lst, .csv), "
            "a .parquet, .zip or .tar.gz, 'idx:DIR/train', or 'torchvision:NAME:SPLIT@ROOT'."
        )
    return sorted(_Walk(folder, tally, walked).files())


def has_images(folder: Path) -> bool:
    """Return whether there is an image below a folder that can be listed."""
    return next(_Walk(folder, Tally()).files(), None) is not None


class _Walk:
    def __init__(self, folder: Path, tally: Tally, walked: list[str] | None = None) -> None:
        self.folder, self.tally = folder, tally
        self.walked = [] if walked is None else walked
        self.visited: set[tuple[int, int]] = set()  # device and inode of every folder
        self.links: deque[str] = deque()

    def files(self) -> Iterator[str]:
        """Walk the folders first and then the links, so that none takes a folder's place."""
        yield from self._enter("")
        while self.links:
            link = self.links.popleft()
            if self._is_new(link):
                yield from self._enter(link)

    def _enter(self, top: str) -> Iterator[str]:
        pending = [top]
        while pending:
            place = pending.pop()
            self._remember(place)
            for entry in sorted(self._entries(place), key=lambda entry: entry.name):
                file = f"{place}/{entry.name}" if place else entry.name
                try:
                    is_taken = self._takes(entry, file, pending)
                except OSError as error:
                    self.tally.add(f"unreadable: {error.strerror}", file)
                    continue
                if is_taken:
                    yield file

    def _takes(self, entry: os.DirEntry[str], file: str, pending: list[str]) -> bool:
        """Return whether this is an image; a folder is noted for later, all else is counted."""
        if _INDEX.fullmatch(entry.name):
            return False
        if entry.is_dir(follow_symlinks=False):
            if entry.name.startswith("."):
                self.tally.add("hidden folder", file)
            else:
                pending.append(file)
            return False
        mode = entry.stat().st_mode if entry.is_symlink() else None
        if mode is not None and stat.S_ISDIR(mode):
            self.links.append(file)
        elif not entry.is_file():
            self.tally.add("neither file nor folder", file)
        else:
            return is_image(file, lambda: _head(self.folder / file), self.tally)
        return False

    def _entries(self, place: str) -> list[os.DirEntry[str]]:
        path = self.folder / place
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except FileNotFoundError:
            self.tally.add("vanished folder", place)
            return []
        except OSError as error:
            raise DataError(f"cannot read the folder {path}: {error.strerror}.") from error

    def _remember(self, place: str) -> None:
        self.walked.append(place)
        try:
            status = os.stat(self.folder / place)
        except OSError:
            return  # `_entries` says what is wrong
        self.visited.add((status.st_dev, status.st_ino))

    def _is_new(self, link: str) -> bool:
        """Return whether a link leads to a folder that was not walked, and not around itself."""
        path = self.folder / link
        target, place = os.path.realpath(path), os.path.realpath(path.parent)
        status = os.stat(path)
        if posixpath.basename(link).startswith("."):
            self.tally.add("hidden folder", link)
        elif os.path.commonpath([target, place]) == target:
            self.tally.add("link to a folder around it", link)
        elif (status.st_dev, status.st_ino) in self.visited:
            self.tally.add("link to a folder that was read already", link)
        else:
            return True
        return False


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)
