"""Images in a zip or a tar: .zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz.

They are read where they are, but from a compressed tar only after a copy (see `blobs.py`).
Nothing is unpacked under the names that an archive gives. One folder around all is not a class.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self, cast

from deepclust.data.images.formats import HEAD
from deepclust.data.pack.blobs import LARGEST, Blobs, Files, failed
from deepclust.data.pack.tally import Tally, shown
from deepclust.data.pack.walk import is_image

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_ENCRYPTED = 0x1
_ENDS = ("EOFHeaderError", "EmptyHeaderError")
_BLOCK = 1 << 20
_LINKS = 40  # steps from link to link, as Linux allows


def zip_images(path: Path, tally: Tally, files: Files) -> tuple[list[str], Callable[[int], bytes]]:
    """Return the names of the images of a zip, and a function that reads one."""
    file = files.read(path)
    try:
        archive = files.opened.enter_context(zipfile.ZipFile(file))
        members = [info for info in archive.infolist() if _is_zip_image(archive, info, tally)]
    except Exception as error:  # zipfile raises almost anything on damaged files
        raise failed(path, error, files.folder) from error

    def read(i: int) -> bytes:
        try:
            return archive.read(members[i])
        except Exception as error:
            raise OSError(0, f"damaged in the archive ({type(error).__name__})") from error

    return [_relative(info.filename) for info in members], read


def _is_zip_image(archive: zipfile.ZipFile, info: zipfile.ZipInfo, tally: Tally) -> bool:
    name = _relative(info.filename)
    if info.is_dir():
        return False
    if stat.S_ISLNK(info.external_attr >> 16):
        tally.add("link in an archive", name)
    elif info.flag_bits & _ENCRYPTED:
        tally.add("encrypted in the archive", name)
    elif info.file_size > LARGEST:
        tally.add(f"larger than {LARGEST >> 30} GiB", name)
    else:
        return _is_visible(name, tally) and is_image(name, lambda: _zip_head(archive, info), tally)
    return False


def _zip_head(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            return file.read(HEAD)
    except Exception:  # damaged: no image by its first bytes
        return b""


def tar_images(path: Path, tally: Tally, files: Files) -> tuple[list[str], Callable[[int], bytes]]:
    """Return the names of the images of a tar, and a function that reads one.

    Those of a compressed tar are copied into an unnamed file.
    """
    file = files.read(path)
    plain = _opened(file)
    if plain is not None:
        files.opened.enter_context(plain)
    members = _Tar(Blobs(file if plain is None else files.scratch()), tally)
    try:
        # A stream never goes back, so a header of a negative size cannot make it turn in a circle.
        with tarfile.open(
            fileobj=files.read(path) if plain is None else plain, mode="r|", tarinfo=_Header
        ) as tar:
            for member in tar:
                members.take(member, tar, is_copied=plain is not None)
        while plain is not None and plain.read(_BLOCK):
            pass  # so that the checksum at the end is compared
        members.blobs.file.flush()
    except Exception as error:  # tarfile raises almost anything on damaged files
        raise failed(path, error, files.folder) from error
    members.resolve_links()
    return members.names, members.blobs.read


def _opened(file: BinaryIO) -> BinaryIO | None:
    """Return a reader of a compressed file, that notices a lost end, or None for a plain one."""
    magic = file.read(6)
    file.seek(0)
    for start, opener in _COMPRESSED.items():
        if magic.startswith(start):
            return cast(BinaryIO, opener(file))
    return None


_COMPRESSED: dict[bytes, Callable[[BinaryIO], object]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


class _Header(tarfile.TarInfo):
    """A header that is an error where it is damaged; tarfile would take that for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """Read the next header, or raise EOFError, or tarfile's errors for an end."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ in _ENDS:
                raise
            raise EOFError(f"{error} at offset {tarfile_.offset}") from error


@dataclass
class _Tar:
    """The images of a tar, as its members come by."""

    blobs: Blobs
    tally: Tally
    names: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)

    def take(self, member: tarfile.TarInfo, tar: tarfile.TarFile, is_copied: bool) -> None:
        """Keep an image or a link, and count anything else but folders."""
        name = _relative(member.name)
        if member.issym():
            self.links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
        elif member.islnk():
            self.links[name] = member.linkname
        elif member.issparse() or not (member.isfile() or member.isdir()):
            self.tally.add("neither file nor folder in the archive", name)
        elif member.size < 0:
            raise EOFError(f"{shown(name)} has {member.size} bytes")
        elif member.size > LARGEST:
            self.tally.add(f"larger than {LARGEST >> 30} GiB", name)
        elif member.isfile() and _is_visible(name, self.tally):
            self._keep(name, member, cast(BinaryIO, tar.extractfile(member)), is_copied)

    def _keep(self, name: str, member: tarfile.TarInfo, content: BinaryIO, is_copied: bool) -> None:
        head = content.read(HEAD)
        if not is_image(name, lambda: head, self.tally):
            return
        size = self.blobs.copy(head, content) if is_copied else len(head)
        if not is_copied:
            self.blobs.add(member.offset_data, member.size)
            size = min(member.size, os.fstat(self.blobs.file.fileno()).st_size - member.offset_data)
        if size != member.size:
            raise EOFError(f"{shown(name)} is cut off")
        self.names.append(name)

    def resolve_links(self) -> None:
        """Give a link the image that it leads to, which may be another link."""
        places = {name: i for i, name in enumerate(self.names)}
        for name in self.links:
            target, steps = name, 0
            while target in self.links and steps < _LINKS:
                target, steps = _relative(self.links[target]), steps + 1
            if target in places and _is_visible(name, self.tally):
                self.names.append(name)
                self.blobs.add(*self.blobs.places[places[target]])
            elif target not in places:
                self.tally.add("link that leads to no image of the archive", name)


def _relative(name: str) -> str:
    """Return the name of a member as a relative path without "." and ".."."""
    parts = posixpath.normpath(name.replace("\\", "/")).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _is_visible(name: str, tally: Tally) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    if hidden:
        tally.add("hidden", name)
    return not hidden and bool(name)
