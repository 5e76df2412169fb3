"""Bytes out of shards: open files, `pread` at an offset, repeated after an error of the storage."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from deepclust.data.shards import remote
from deepclust.data.shards.remote import PAUSES_S
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError

_PERMANENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR}


class ShardFiles:
    """A reader of byte ranges of shards, from their copy in the folder `cache` where there is one.

    Copies are named by the shard's ordinal (`shard_cache.py`). At most `keep_open` files stay open.
    With a cache none is open after `release`, so that a deleted copy frees its space. A remote
    shard without a copy costs a request for each image.
    """

    def __init__(self, shards: list[Source], cache: Path | None = None, keep_open: int = 128):
        self.shards, self.cache, self.keep_open = shards, cache, keep_open
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names: another process opens the files itself."""
        return ShardFiles, (self.shards, self.cache, self.keep_open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of the shard with that ordinal.

        Raises `DataError` if the shard ends before that, or still cannot be read after
        `len(PAUSES_S)` more attempts. For a remote shard that is its subclass `UnreachableError`.
        """
        for pause in (*PAUSES_S, None):
            try:
                return self._read(shard, offset, size)
            except OSError as error:
                self._forget(shard)
                if pause is None or error.errno in _PERMANENT:
                    raise DataError(f"cannot read {self.shards[shard]}: {error.strerror}") from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def release(self) -> None:
        """Close all files where there is a cache, whose copies may be deleted now."""
        if self.cache is not None:
            self.close()

    def close(self) -> None:
        """Close all files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        handle = self._open.get(shard)
        if handle is None:
            handle = self._open_shard(shard)
        if handle is None:
            return self._read_remote(shard, offset, size)
        data = os.pread(handle, size, offset)
        while len(data) < size:
            more = os.pread(handle, size - len(data), offset + len(data))
            if not more:
                raise DataError(
                    f"{self.shards[shard]} ends at byte {offset + len(data)}, inside an image; "
                    "it was cut after it was indexed: run deepclust index --verify"
                )
            data += more
        return data

    def _open_shard(self, shard: int) -> int | None:
        """Return a new handle, or None for a remote shard that has no copy."""
        while len(self._open) >= self.keep_open:
            os.close(self._open.popitem(last=False)[1])
        handle, source = self._open_copy(shard), self.shards[shard]
        if handle is None and isinstance(source, Path):
            handle = os.open(source, os.O_RDONLY)
        if handle is not None:
            self._open[shard] = handle
        return handle

    def _read_remote(self, shard: int, offset: int, size: int) -> bytes:
        source = self.shards[shard]
        assert isinstance(source, Url)
        return remote.read(source, offset, size)

    def _open_copy(self, shard: int) -> int | None:
        if self.cache is not None:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.cache / str(shard), os.O_RDONLY)
        return None

    def _forget(self, shard: int) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            os.close(handle)
