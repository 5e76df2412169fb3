"""Bytes out of shards: open files, `pread` at an offset, repeated after an error of the storage.

A storage that fails (EIO, ESTALE, ETIMEDOUT, ...) is not a bad image. A read is repeated for
`PATIENCE_S`, and then the run stops, as it does for remote shards. A shard that is missing,
forbidden, cut or another one stops it at once. Replacing the images of a whole shard would give
other weights with hardly a word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepclust.data.shards import remote
from deepclust.data.shards.remote import PAUSES_S, Interrupted, UnreachableError, never
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError

PATIENCE_S = 60.0  # for a read, all attempts together
# what no attempt mends; every other error may pass
FINAL = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW,
    0,  # of `blobs.read_file`: no regular file, or too large
}  # fmt: skip
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class ShardFiles:
    """A reader of byte ranges of shards, from their copy in the folder `cache` where there is one.

    Copies are named by the shard's ordinal (`shard_cache.py`). `lengths` are the shards' sizes in
    bytes when they were indexed. At most `keep_open` files stay open. With a cache none is open
    after `release`, so that a deleted copy frees its space. A remote shard without a copy costs a
    request for each image. `stopped` may end the pauses between attempts.
    """

    def __init__(
        self,
        shards: Sequence[Source],
        cache: Path | None = None,
        lengths: Sequence[int] | None = None,
        keep_open: int = 128,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.shards, self.cache, self.lengths = shards, cache, lengths
        self.keep_open, self.patience_s = keep_open, patience_s
        self.stopped: Callable[[], bool] = never
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names: another process opens the files itself."""
        return ShardFiles, (
            self.shards, self.cache, self.lengths, self.keep_open, self.patience_s
        )  # fmt: skip

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of the shard with that ordinal.

        Raises `UnreachableError` if the shard is not what was indexed, or still cannot be read
        after `patience_s`, and `Interrupted` when `stopped` says so in between.
        """
        began, pauses = time.monotonic(), iter(PAUSES_S)
        while True:
            try:
                return self._read(shard, offset, size)
            except (OSError, OverflowError) as error:
                self._forget(shard)
                number = getattr(error, "errno", errno.EINVAL)
                if number in _NO_DESCRIPTOR:
                    self.close()
                waited = time.monotonic() - began
                if number in FINAL or waited >= self.patience_s:
                    raise self._unreachable(shard, error, waited) from None
            self._pause(next(pauses, PAUSES_S[-1]))

    def _pause(self, seconds: float) -> None:
        if self.stopped():
            raise Interrupted
        time.sleep(seconds)

    def _unreachable(self, shard: int, error: Exception, waited: float) -> DataError:
        reason = getattr(error, "strerror", None) or str(error)
        final = getattr(error, "errno", None) in FINAL
        tried = "" if final else f", again and again for {waited:.0f} s"
        return UnreachableError(
            f"cannot read {self.shards[shard]}: {reason}{tried}. Finished work is kept: resume "
            "when the shard can be read again."
        )

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
                raise UnreachableError(
                    f"{self.shards[shard]} ends at byte {offset + len(data)}, inside an image. It "
                    f"was cut after it was indexed. {_RESTORE}"
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
            self._check_length(shard, handle)
        return handle

    def _check_length(self, shard: int, handle: int) -> None:
        """Raise `UnreachableError` if another file has taken the shard's place."""
        if self.lengths is None or (size := os.fstat(handle).st_size) == self.lengths[shard]:
            return
        raise UnreachableError(
            f"{self.shards[shard]} has {size} bytes, and had {self.lengths[shard]} when it was "
            f"indexed: it was replaced, cut, or written further. {_RESTORE}"
        )

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


_RESTORE = (
    "Restore it and resume. For a new run, index the shards again: `deepclust index SHARDS`, after "
    "deleting the old index."
)
