"""The members of a tar file: where each one's bytes begin, and what is left out.

`tarfile` and `webdataset` stop without an error at a damaged header and at a missing end-of-archive
marker. They also stop at the end of the first of two tars joined by `cat`. Here each of these is an
error that names the file, the offset and the fix. Headers are read by one `pread` of 512 bytes
each, so that several threads can wait for a slow disk together, and understood by `header.py`.
Nothing is extracted, and whatever a header says, the next position is behind it.

A shard behind a URL is read from front to back in large blocks, because a request costs more than
the images between two headers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepclust.data.shards import header as headers
from deepclust.data.shards import remote
from deepclust.data.shards.header import BLOCK, Header
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError

_END = bytes(BLOCK)
_LARGEST_PADDING = (1 << 20) + 2 * BLOCK  # bytes of zeros that a tar may well end with
_TAIL_BLOCK = 1 << 20
_ZEROS = bytes(_TAIL_BLOCK)
_LARGEST_EXTENSION = 1 << 20  # bytes of a PAX header or a GNU long name
_OTHER_KINDS = {
    headers.SYMBOLIC_LINK: "symbolic link (write the tar with `tar --dereference`)",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
}
_LOST_LINK = (
    "hard link to a file that is not before it in this tar (write the tar with "
    "`tar --hard-dereference`)"
)
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
    data_from: Callable[[int], int] = lambda offset: offset  # past a hole, where there is one

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


@contextlib.contextmanager
def open_shard(path: Source, stopped: Callable[[], bool] = remote.never) -> Iterator[Shard]:
    """Open a shard, and turn errors of the disk into a DataError that names it.

    A shard behind a URL must have its size, and is read until `stopped()` is true.
    """
    if isinstance(path, Url):
        yield Shard(path, _Blocks(path, stopped).read, path.size)
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise DataError(f"shard {path} is not a regular file. Take it out of the folder.")
            size, read = about.st_size, functools.partial(os.pread, handle)
            yield Shard(path, read, size, functools.partial(_data_from, handle, size))
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}.") from error


def _data_from(handle: int, size: int, offset: int) -> int:
    """Return the first offset from this one on where a sparse file is not a hole of zeros."""
    try:
        return os.lseek(handle, offset, os.SEEK_DATA)
    except OSError as error:  # ENXIO: nothing but a hole; other systems cannot tell
        return size if error.errno == errno.ENXIO else offset


Left = Callable[[str, str], None]  # given the reason and the name of every member left out


def ignore(reason: str, name: str) -> None:
    """Leave a member out without counting it: for callers that want the digest alone."""


def entries(shard: Shard, left: Left = ignore) -> Iterator[TarEntry]:
    """Yield the regular files in order, and hard links as the file that they name.

    Folders are passed over. `left` is called with every other member. Names that are not UTF-8 hold
    their bytes as surrogates, as in `tarfile`.

    Raises DataError for a file that is empty, compressed, not a tar, damaged, truncated, or sparse,
    or that has data after its end.
    """
    position = 0
    targets: dict[str, tuple[int, int]] | None = None  # filled at the first hard link
    while (block := shard.read(BLOCK, position)) != _END:
        header, start = _member(shard, block, position)
        if header.kind == headers.HARD_LINK and targets is None:
            targets = _by_name(shard, position)
        place = _place(header, start, targets)
        if place is None:
            _tell(header, left)
        else:
            if targets is not None:
                targets[_plain_name(header.name)] = place
            yield TarEntry(header.name, *place)
        position = _following(shard, header, start)
    _check_tail(shard, position, left)


def _place(
    header: Header, start: int, targets: dict[str, tuple[int, int]] | None
) -> tuple[int, int] | None:
    """Return offset and size of a member's bytes, or None if it has none in this tar."""
    if header.kind in headers.REGULAR:
        return start, header.size
    if header.kind == headers.HARD_LINK and targets is not None:
        return targets.get(_plain_name(header.target))
    return None


def _by_name(shard: Shard, stop: int) -> dict[str, tuple[int, int]]:
    """Return offset and size of the regular files before `stop`, for hard links.

    Only a shard that has hard links needs it, and is read again up to the first of them.
    """
    targets: dict[str, tuple[int, int]] = {}
    position = 0
    while position < stop:
        header, start = _member(shard, shard.read(BLOCK, position), position)
        if header.kind in headers.REGULAR:
            targets[_plain_name(header.name)] = start, header.size
        position = _following(shard, header, start)
    return targets


def _plain_name(name: str) -> str:
    return name.removeprefix("./")


def _tell(header: Header, left: Left) -> None:
    if header.kind == headers.FOLDER:
        return
    reason = _OTHER_KINDS.get(header.kind, f"member of the unknown type {header.kind!r}")
    left(_LOST_LINK if header.kind == headers.HARD_LINK else reason, header.name)


def _member(shard: Shard, block: bytes, position: int) -> tuple[Header, int]:
    """Return the member at this position, with its extended headers, and where its data begin."""
    long: dict[bytes, str] = {}
    pax: dict[str, str] = {}
    at = position
    try:
        while (header := _header(shard, block, at)).kind in headers.EXTENSIONS:
            headers.extend(header, _extension(shard, header, at), long, pax)
            at = _following(shard, header, at + BLOCK)
            block = shard.read(BLOCK, at)
            if len(block) < BLOCK or block == _END:
                raise _truncated(shard, f"the header at offset {position} has no member after it")
        if headers.is_sparse(header, pax):
            raise shard.wrong(
                f"{header.name!r} is a sparse file", "Write the tar without --sparse."
            )
        extended = bool(long or pax)
        return headers.with_extensions(header, long, pax) if extended else header, at + BLOCK
    except DataError:
        raise
    except ValueError as error:
        raise _damaged(shard, position, str(error)) from error


def _header(shard: Shard, block: bytes, at: int) -> Header:
    if len(block) < BLOCK:
        raise _ended_early(shard, block, at)
    try:
        return headers.parse(block)
    except ValueError as error:
        raise _no_header(shard, block, at, str(error)) from error


def _extension(shard: Shard, header: Header, at: int) -> bytes:
    """Return the data of an extended header."""
    if header.size > _LARGEST_EXTENSION:
        raise _damaged(shard, at, f"it has an extended header of {header.size} bytes")
    data = shard.read(header.size, at + BLOCK)
    if len(data) < header.size:
        raise _truncated(shard, f"the header at offset {at} has no member after it")
    return data


def _following(shard: Shard, header: Header, start: int) -> int:
    """Return the position after a member's data, which is behind its header and in the file."""
    size = 0 if header.kind in headers.DATALESS else header.size
    following = start + -(-size // BLOCK) * BLOCK
    if following > shard.size:
        raise _truncated(shard, f"the member at offset {start - BLOCK} ends at {following}")
    return following


def _check_tail(shard: Shard, position: int, left: Left) -> None:
    """Raise if anything but zeros follows the end marker: further members would be lost.

    Holes of a sparse file are not read. Behind a URL only the first 1 MiB is.
    """
    start = position
    if shard.size - position > _LARGEST_PADDING:
        left("end of more than 1 MiB of zeros, as in an unfinished copy", shard.path.name)
    while block := shard.read(_TAIL_BLOCK, position := shard.data_from(position)):
        if block != _ZEROS[: len(block)]:
            raise shard.wrong(
                f"data follows its end-of-archive marker (offset {position}), as when tars are "
                "joined with `cat`",
                "Join them with `tar --concatenate`, or keep them as separate shards.",
            )
        position += len(block)
        if isinstance(shard.path, Url) and position >= start + _LARGEST_PADDING:
            return  # gigabytes of zeros are not fetched: what `cat` joins follows at once


def _no_header(shard: Shard, header: bytes, position: int, why: str) -> DataError:
    if position:
        return _damaged(shard, position, why)
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
        return _no_header(shard, header, position, "")
    return _truncated(shard, f"there is no end-of-archive marker at offset {position}")


def _damaged(shard: Shard, position: int, why: str) -> DataError:
    return shard.wrong(f"damaged or cut short at offset {position} ({why})", _REWRITE)


def _truncated(shard: Shard, what: str) -> DataError:
    return shard.wrong(f"truncated: it has {shard.size} bytes, and {what}", _REWRITE)
