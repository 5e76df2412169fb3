"""Bytes out of shards: open files, `pread` at an offset, and again if the storage had a hiccup."""

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

_HOPELESS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR}


class ShardFiles:
    """Reads byte ranges of shards, from their copy in `staged` where there is one.

    Copies are named by the shard's ordinal (see `staging.py`). At most `keep_open` files stay
    open; with copies none does after `release`, so that a deleted copy frees its space. A remote
    shard without a copy costs a request for each image.
    """

    def __init__(self, shards: list[Source], staged: Path | None = None, keep_open: int = 128):
        self.shards, self.staged, self.keep_open = shards, staged, keep_open
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens files of its own."""
        return ShardFiles, (self.shards, self.staged, self.keep_open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the shard with that ordinal.

        Raises `DataError` if the shard ends before that, or still cannot be read after
        `len(PAUSES_S)` more attempts; of a remote one it is an `UnreachableError`.
        """
        for pause in (*PAUSES_S, None):
            try:
                return self._read(shard, offset, size)
            except OSError as error:
                self._forget(shard)
                if pause is None or error.errno in _HOPELESS:
                    raise DataError(f"cannot read {self.shards[shard]}: {error.strerror}") from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def release(self) -> None:
        """Close what may be deleted by now: all files where there are copies, else none."""
        if self.staged is not None:
            self.close()

    def close(self) -> None:
        """Close all files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        handle = self._open.get(shard)
        if handle is None:
            handle = self._opened(shard)
        if handle is None:
            return self._far(shard, offset, size)
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

    def _opened(self, shard: int) -> int | None:
        """A new handle; None for a remote shard that has no copy."""
        while len(self._open) >= self.keep_open:
            os.close(self._open.popitem(last=False)[1])
        handle, source = self._copy(shard), self.shards[shard]
        if handle is None and isinstance(source, Path):
            handle = os.open(source, os.O_RDONLY)
        if handle is not None:
            self._open[shard] = handle
        return handle

    def _far(self, shard: int, offset: int, size: int) -> bytes:
        source = self.shards[shard]
        assert isinstance(source, Url)
        return remote.read(source, offset, size)

    def _copy(self, shard: int) -> int | None:
        if self.staged is not None:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.staged / str(shard), os.O_RDONLY)
        return None

    def _forget(self, shard: int) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            os.close(handle)
