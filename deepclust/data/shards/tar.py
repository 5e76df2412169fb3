"""The members of a tar file: where each one's bytes begin.

`tarfile` and `webdataset` stop without an error at a damaged header and at a missing end-of-archive
marker. They also stop at the end of the first of two tars joined by `cat`. Here each of these is an
error that names the file, the offset and the fix.

`tarfile` reads about 25,000 headers a second. Plain headers are therefore read here, each by one
`pread` of 512 bytes, so that several threads can wait for a slow disk together. The others (PAX,
GNU long names, ustar prefixes, sizes in base 256) are read by `tarfile`. Nothing is extracted.

A shard behind a URL is read from front to back in large blocks, because a request costs more than
the images between two headers.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from deepclust.data.shards import remote
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError

_BLOCK = 512
_END = bytes(_BLOCK)
_REGULAR = b"0\0"
_COMPRESSIONS = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_REWRITE = "Copy or write the shard again."


class TarEntry(NamedTuple):
    """One regular file of a tar: its name, the offset of its first byte, and its size."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """An open tar file, where `read(size, offset)` returns fewer bytes only at its end."""

    path: Source
    read: Callable[[int, int], bytes]
    size: int

    def wrong(self, what: str, fix: str) -> DataError:
        """Return the error that names this shard."""
        return DataError(f"shard {self.path}: {what}. {fix}")


class _Blocks:
    """A remote file with a cache of its last two blocks."""

    def __init__(self, url: Url, stopped: Callable[[], bool]) -> None:
        self.url, self.stopped = url, stopped
        self._block = functools.lru_cache(2)(self._fetch)

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes as `pread` does."""
        data, stop = b"", min(offset + size, self.url.size)
        while (at := offset + len(data)) < stop:
            number, begin = divmod(at, remote.CHUNK)
            data += self._block(number)[begin : begin + stop - at]
        return data

    def _fetch(self, number: int) -> bytes:
        start = number * remote.CHUNK
        size = min(remote.CHUNK, self.url.size - start)
        return remote.read(self.url, start, size, self.stopped)


class _File(io.RawIOBase):
    """A shard as the file object that `tarfile` needs."""

    def __init__(self, shard: Shard, position: int) -> None:
        self.shard, self.position = shard, position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.shard.read(len(buffer), self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@contextlib.contextmanager
def open_shard(path: Source, stopped: Callable[[], bool] = remote.never) -> Iterator[Shard]:
    """Open a shard, and turn errors of the disk into a DataError that names it.

    A shard behind a URL must have its size, and is read until `stopped()` is true.
    """
    if isinstance(path, Url):
        yield Shard(path, _Blocks(path, stopped).read, path.size)
        return
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            yield Shard(path, functools.partial(os.pread, handle), os.fstat(handle).st_size)
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}.") from error


def entries(shard: Shard) -> Iterator[TarEntry]:
    """Yield the regular files in order, without folders and links.

    Names that are not UTF-8 hold their bytes as surrogates, as in `tarfile`.

    Raises DataError for a file that is empty, compressed, not a tar, damaged, truncated, or sparse,
    or that has data after its end.
    """
    position = 0
    while (header := shard.read(_BLOCK, position)) != _END:
        entry, following = _plain(header, position) or _extended(shard, header, position)
        if following > shard.size:
            raise _truncated(shard, f"the member at offset {position} ends at {following}")
        if entry is not None:
            yield entry
        position = following
    _check_tail(shard, position)


def _plain(header: bytes, position: int) -> tuple[TarEntry | None, int] | None:
    """Return the regular file that this header alone describes, or None for `_extended`."""
    if len(header) < _BLOCK or header[156] not in _REGULAR or header[124] & 0x80 or header[345]:
        return None
    try:
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        checksum = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    name = header[:100].partition(b"\0")[0]
    counted = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if counted != checksum or name.endswith(b"/"):
        return None
    start = position + _BLOCK
    text = name.decode("utf-8", "surrogateescape")
    return TarEntry(text, start, size), start + -(-size // _BLOCK) * _BLOCK


def _extended(shard: Shard, header: bytes, position: int) -> tuple[TarEntry | None, int]:
    """Return the entry at this position, read by `tarfile`, or None for folders and links."""
    if len(header) < _BLOCK:
        raise _ended_early(shard, header, position)
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _no_header(shard, header, position) from error
    try:
        info, following = _read_with_tarfile(shard, position)
    except tarfile.TarError as error:
        raise _damaged(shard, position) from error
    if info is None:
        raise _truncated(shard, f"the header at offset {position} has no member after it")
    if info.issparse():
        raise shard.wrong(f"{info.name!r} is a sparse file", "Write the tar without --sparse.")
    if not info.isreg():
        return None, following
    return TarEntry(info.name, info.offset_data, info.size), following


def _read_with_tarfile(shard: Shard, position: int) -> tuple[tarfile.TarInfo | None, int]:
    with _File(shard, position) as file:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        return tar.next(), tar.offset


def _check_tail(shard: Shard, position: int) -> None:
    """Raise if anything but zeros follows the end marker: further members would be lost."""
    while block := shard.read(1 << 16, position):
        if block.count(0) != len(block):
            raise shard.wrong(
                f"data follows its end-of-archive marker (offset {position}), as when tars are "
                "joined with `cat`",
                "Join them with `tar --concatenate`, or keep them as separate shards.",
            )
        position += len(block)


def _no_header(shard: Shard, header: bytes, position: int) -> DataError:
    if position:
        return _damaged(shard, position)
    for magic, program in _COMPRESSIONS.items():
        if header.startswith(magic):
            return shard.wrong(
                "compressed, but samples are read by their offset in a plain tar",
                f"Unpack it (`{program}`); images are compressed already.",
            )
    return shard.wrong("not a tar file", "Take it out of the folder, or write it again.")


def _ended_early(shard: Shard, header: bytes, position: int) -> DataError:
    if shard.size == 0:
        return shard.wrong("empty (0 bytes)", _REWRITE)
    if position == 0:
        return _no_header(shard, header, position)
    return _truncated(shard, f"there is no end-of-archive marker at offset {position}")


def _damaged(shard: Shard, position: int) -> DataError:
    return shard.wrong(f"damaged or cut short at offset {position}", _REWRITE)


def _truncated(shard: Shard, what: str) -> DataError:
    return shard.wrong(f"truncated: it has {shard.size} bytes, and {what}", _REWRITE)
