"""Many images in one file, read by their offsets: what archives and tables are packed from.

Shards are shuffled, and a compressed archive can only be read from its beginning. So its images are
first copied to a temporary file, which has no name and vanishes with the process.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from deepclust.data.pack.tally import shown
from deepclust.errors import DataError, DeepclustError, DiskError
from deepclust.files import disk_errors

LARGEST = 1 << 30  # bytes of one image; more is a mistake or an attack
_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Blobs:
    """The images of one file: `read(i)` returns the bytes of the i-th that was added."""

    def __init__(self, file: BinaryIO) -> None:
        """Begin with no image."""
        self.file = file
        self.places: list[tuple[int, int]] = []

    def add(self, offset: int, size: int) -> None:
        """Add an image that is in the file already."""
        self.places.append((offset, size))

    def put(self, data: bytes) -> None:
        """Append an image to the file, which has to be our own."""
        self.add(self.file.tell(), len(data))
        self.file.write(data)

    def copy(self, head: bytes, source: BinaryIO) -> int:
        """Append an image to the file, which has to be our own, and return its size."""
        offset = self.file.tell()
        self.file.write(head)
        while block := source.read(_BLOCK):
            self.file.write(block)
        size = self.file.tell() - offset
        self.add(offset, size)
        return size

    def read(self, i: int) -> bytes:
        """Return the bytes of image i, for any thread."""
        offset, size = self.places[i]
        return os.pread(self.file.fileno(), size, offset)


@dataclass(frozen=True)
class Files:
    """The files that a source holds open until it is packed, and the folder for its copies."""

    folder: Path = Path()
    opened: ExitStack = field(default_factory=ExitStack)

    def read(self, path: Path) -> BinaryIO:
        """Open a file for reading, or raise DataError."""
        try:
            return self.opened.enter_context(open(path, "rb"))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise DataError(f"cannot read {shown(str(path))}: {error}.") from error

    def scratch(self) -> BinaryIO:
        """Return an unnamed file on the disk of the folder, or raise DiskError."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - `opened` closes it
        return self.opened.enter_context(file)


def failed(path: Path, error: Exception, folder: Path) -> DeepclustError:
    """Return the error of a source that cannot be read, or of the disk of its copy."""
    if isinstance(error, DeepclustError):
        return error
    if isinstance(error, OSError) and error.errno in _FULL:
        return DiskError(f"cannot write to {folder}: {error.strerror}. Free some space there.")
    reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    return DataError(f"cannot read {path}: {reason}. Fetch it again, or unpack what is whole.")


def read_file(path: Path) -> bytes:
    """Read a regular file, without waiting for the other end of a pipe, or raise OSError."""
    with _regular(path) as file:
        return file.read()


def read_head(path: Path, count: int) -> tuple[bytes, int]:
    """Read the first bytes of a regular file, and return them and its size, or raise OSError."""
    with _regular(path) as file:
        return file.read(count), os.fstat(file.fileno()).st_size


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:
        raise OSError(0, "a NUL in its name", os.fspath(path)) from error
    with open(handle, "rb", buffering=0) as raw:
        file = cast(BinaryIO, raw)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "neither file nor folder", os.fspath(path))
        if status.st_size > LARGEST:
            raise OSError(0, f"larger than {LARGEST >> 30} GiB", os.fspath(path))
        yield file
