"""The members of a tar file: where each one's bytes begin, with nothing lost in silence.

`tarfile` and `webdataset` stop without a word at a damaged header, at a missing end-of-archive
marker, and at the end of the first of two tars joined by `cat`; here each of these is an error that
names the file, the offset and the fix.

`tarfile` reads about 25,000 headers a second. Plain headers are therefore read here (one `pread` of
512 bytes, so that several threads can wait for a slow disk together), the others (PAX, GNU long
names, ustar prefixes, sizes in base 256) by `tarfile`. Nothing is extracted. A shard behind a URL
is read from front to back in large blocks, for a request costs more than the images between two
headers.
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


class Member(NamedTuple):
    """One regular file of a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A tar file that is open: `read(size, offset)` gives fewer bytes at its end only."""

    path: Source
    read: Callable[[int, int], bytes]
    size: int

    def wrong(self, what: str, fix: str) -> DataError:
        """The error that names this shard."""
        return DataError(f"shard {self.path}: {what}. {fix}")


class _Blocks:
    """A remote file, of which the last two blocks are kept: one for headers, one behind it."""

    def __init__(self, url: Url, stopped: Callable[[], bool]) -> None:
        self.url, self.stopped = url, stopped
        self._block = functools.lru_cache(2)(self._fetched)

    def read(self, size: int, offset: int) -> bytes:
        """As `pread`."""
        data, stop = b"", min(offset + size, self.url.size)
        while (at := offset + len(data)) < stop:
            number, begin = divmod(at, remote.CHUNK)
            data += self._block(number)[begin : begin + stop - at]
        return data

    def _fetched(self, number: int) -> bytes:
        start = number * remote.CHUNK
        size = min(remote.CHUNK, self.url.size - start)
        return remote.read(self.url, start, size, self.stopped)


class _File(io.RawIOBase):
    """A shard as the file object that `tarfile` wants."""

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
def opened(path: Source, stopped: Callable[[], bool] = remote.never) -> Iterator[Shard]:
    """Open a shard; whatever the disk refuses is a DataError that names it.

    One behind a URL has to know its size, and is read until `stopped` says so.
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


def members(shard: Shard) -> Iterator[Member]:
    """The regular files, in order, up to the end-of-archive marker; folders and links are skipped.

    Names that are no UTF-8 carry their bytes as surrogates, as in `tarfile`. Raises DataError for a
    file that is empty, compressed, no tar, damaged, truncated, sparse, or goes on after its end.
    """
    position = 0
    while (header := shard.read(_BLOCK, position)) != _END:
        member, following = _plain(header, position) or _extended(shard, header, position)
        if following > shard.size:
            raise _truncated(shard, f"the member at offset {position} ends at {following}")
        if member is not None:
            yield member
        position = following
    _check_tail(shard, position)


def _plain(header: bytes, position: int) -> tuple[Member | None, int] | None:
    """A regular file whose name and size stand in this one header; else None, without judging."""
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
    return Member(text, start, size), start + -(-size // _BLOCK) * _BLOCK


def _extended(shard: Shard, header: bytes, position: int) -> tuple[Member | None, int]:
    """Whatever stands at this position, read by `tarfile`; None for folders and links."""
    if len(header) < _BLOCK:
        raise _ended_early(shard, header, position)
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _no_header(shard, header, position) from error
    try:
        found, following = _read_with_tarfile(shard, position)
    except tarfile.TarError as error:
        raise _damaged(shard, position) from error
    if found is None:
        raise _truncated(shard, f"the header at offset {position} has no member after it")
    if found.issparse():
        raise shard.wrong(f"{found.name!r} is a sparse file", "Write the tar without --sparse.")
    if not found.isreg():
        return None, following
    return Member(found.name, found.offset_data, found.size), following


def _read_with_tarfile(shard: Shard, position: int) -> tuple[tarfile.TarInfo | None, int]:
    with _File(shard, position) as file:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        return tar.next(), tar.offset


def _check_tail(shard: Shard, position: int) -> None:
    """Only zeros may follow the end marker: further members would be lost in silence."""
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
    return _truncated(shard, f"no end-of-archive marker stands at offset {position}")


def _damaged(shard: Shard, position: int) -> DataError:
    return shard.wrong(f"damaged or cut short at offset {position}", _REWRITE)


def _truncated(shard: Shard, what: str) -> DataError:
    return shard.wrong(f"truncated: it has {shard.size} bytes, and {what}", _REWRITE)
