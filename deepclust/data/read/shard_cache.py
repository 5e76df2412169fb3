"""Reading by block: whole shards are copied to a node-local cache (`data.scratch`) and read there.

Shared file systems and object stores are fast at long sequential reads and slow at a read per
image. A thread walks through the requests ahead of the training and copies the shards they need, in
their order. It passes a request on when its shards are there. A plan with lanes needs few shards
at a time. One without lanes needs nearly all, and what does not fit is read from the source, image
by image. The bytes are the same either way. A remote shard that cannot be read ends the stream with
an error. For a shard that is a file, the workers try again and raise.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np

from deepclust.data.owned_folder import make_folder
from deepclust.data.read.dataset import Request
from deepclust.data.read.patience import LOOK_S, Patience
from deepclust.data.read.pieces_ahead import PiecesAhead
from deepclust.data.shards import remote
from deepclust.data.shards.index import Index
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DiskError
from deepclust.files import disk_errors

# Requests that may wait with their shards in place. With many, one rank would take all the work of
# a queue that ranks share (extraction units) before the others have begun.
AHEAD = 64
_LEAVE_S = 10.0
_KIND = "deepclust-shards"
_NETWORK = {
    "nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "ceph", "beegfs", "glusterfs", "afs",
    "panfs", "pvfs2", "orangefs", "wekafs", "ocfs2", "gfs2",
}  # fmt: skip


def on_network(path: Source, mounts: Path = Path("/proc/mounts")) -> bool:
    """Return whether this is a URL or on a network file system (or FUSE) of `mounts`."""
    if isinstance(path, Url):
        return True
    if not mounts.exists():
        return False
    places = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    real = path.resolve()
    around = [
        (len(folder), kind)
        for folder, kind in ((_unescaped(folder), kind) for folder, kind in places)
        if real.is_relative_to(folder)
    ]
    kind = max(around)[1] if around else ""
    return kind in _NETWORK or kind.startswith("fuse.")


def _unescaped(folder: str) -> str:
    return folder.encode().decode("unicode_escape")


class _SourceError(Exception):
    """A shard cannot be read; its OSError is the cause."""


class ShardCache:
    """Copies of at most `limit` shards in `folder`, named by ordinal, dropped by least recent use.

    There is one stream at a time. Copies stay for the next one, so that a set of shards that fits
    is copied once.
    """

    def __init__(
        self, index: Index, scratch: Path, limit: int = 64, patience: Patience | None = None
    ) -> None:
        """Make a folder in `scratch`, and delete those of dead processes of this machine."""
        self.index, self.limit, self.patience = index, limit, patience or Patience()
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            self.folder = make_folder(scratch, _KIND)
        self._copies: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._users: Counter[int] = Counter()  # requests under way that need a copy
        self._under_way: deque[list[int]] = deque()
        self._lock = threading.Lock()
        self._starving = threading.Event()  # the consumer waits for a request, or has just got it
        self._stop = threading.Event()
        self._left: threading.Thread | None = None  # the last one, which may hang in a read

    def stream(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the same requests, each when those of its shards that fit are in `folder`."""
        self._ready = ready = queue.Queue[Request | BaseException | None](AHEAD)
        if self._left is not None and self._left.is_alive():
            raise remote.UnreachableError(
                f"the storage of {self.index.shards[0].parent} does not answer: a read that began "
                f"more than {_LEAVE_S:g} s ago has not ended. Finished work is kept: resume when "
                "it is back."
            )
        self._stop.clear()
        self._under_way.clear()  # what a stream that was left early didn't deliver
        self._users.clear()
        walk = threading.Thread(target=self._walk, args=(requests, ready), daemon=True)
        walk.start()
        try:
            while (item := self._next(ready)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._end(walk, ready)

    def release_oldest(self) -> None:
        """Release the copies of the oldest request under way, which was loaded."""
        with self._lock:
            self._users.subtract(self._under_way.popleft())

    def close(self) -> None:
        """Delete all copies."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _next(self, ready: queue.Queue) -> Request | BaseException | None:
        """Return the next request; each wait is limited, so that a storage cannot hold us."""
        self._starving.set()
        try:
            with self.patience.waiting():
                while True:
                    with contextlib.suppress(queue.Empty):
                        item: Request | BaseException | None = ready.get(timeout=LOOK_S)
                        return item
                    self.patience.check()
        finally:
            self._starving.clear()

    def _end(self, walk: threading.Thread, ready: queue.Queue) -> None:
        """Stop the thread wherever it is, and leave it when a read keeps it from stopping."""
        self._stop.set()
        self._left, deadline = walk, time.monotonic() + _LEAVE_S
        while walk.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            walk.join(timeout=0.01)

    def _walk(self, requests: Iterable[Request], ready: queue.Queue) -> None:
        self._pieces_ahead = PiecesAhead(self.index, self._stop.is_set)
        try:
            for request in self._looking_ahead(requests, ready):
                self._fetch(request)
                if self._stop.is_set():
                    return
                ready.put(request)
            ready.put(None)
        except BaseException as error:  # raised again where the requests are taken
            ready.put(error)
        finally:
            self._pieces_ahead.close()

    def _looking_ahead(self, requests: Iterable[Request], ready: queue.Queue) -> Iterator[Request]:
        """Yield the requests, each when the bytes of those after it are asked for.

        So many are taken that their shards keep the link busy, and `AHEAD` at most, with those that
        wait with their shards in place. An error in the requests comes after those before it.
        """
        taken: deque[Request] = deque()
        try:
            for request in requests:
                taken.append(request)
                if not isinstance(self.index.shards[0], Url):
                    yield taken.popleft()
                    continue
                self._pieces_ahead.want([s for s in self._needed(request) if s not in self._copies])
                while taken and (self._pieces_ahead.is_full or len(taken) + ready.qsize() >= AHEAD):
                    yield taken.popleft()
        except Exception:
            yield from taken
            raise
        yield from taken

    def _needed(self, request: Request) -> list[int]:
        shards: list[int] = np.unique(self.index.locate(request.sample_ids).shard).tolist()
        return shards

    def _fetch(self, request: Request) -> None:
        needed = self._needed(request)
        with self._lock:
            cached = [shard for shard in needed if shard in self._copies]
            self._users.update(cached)
        for shard in needed:
            if shard not in self._copies and self._make_room() and self._copy(shard):
                with self._lock:
                    self._users[shard] += 1
                cached.append(shard)
            if shard in self._copies:
                self._copies[shard] = None
                self._copies.move_to_end(shard)
        with self._lock:
            self._under_way.append(cached)

    def _make_room(self) -> bool:
        """Delete an unused copy if all places are taken, or wait until there is one.

        Return False while the consumer waits for the present request, because the request that
        would free a place may come later. The shard is then read from its source.
        """
        while len(self._copies) >= self.limit:
            # before we look: then it has released what it had, and is not about to take another
            starving = self._starving.is_set() and self._ready.empty()
            with self._lock:
                unused = next((s for s in self._copies if self._users[s] <= 0), None)
            if unused is not None:
                del self._copies[unused]
                (self.folder / str(unused)).unlink(missing_ok=True)
            elif starving or self._stop.wait(0.01):
                return False
        return not self._stop.is_set()

    def _copy(self, shard: int) -> bool:
        """Copy a shard in large reads, or return False if its source cannot be read."""
        partial = self.folder / f".{shard}"
        try:
            with contextlib.closing(self._pieces(shard)) as pieces:
                return self._write(pieces, partial) and self._keep(shard, partial)
        except DiskError:
            raise
        except (remote.Interrupted, _SourceError):
            return False
        except OSError:
            return False  # the workers meet the same error, and know what to do about it

    def _pieces(self, shard: int) -> Generator[bytes, None, None]:
        source = self.index.shards[shard]
        if isinstance(source, Url):
            yield from self._pieces_ahead.take(shard)
            return
        try:
            with open(source, "rb", buffering=0) as file:
                while chunk := file.read(remote.CHUNK):
                    yield chunk
        except OSError as error:  # not of the disk that is written to
            raise _SourceError from error

    def _write(self, pieces: Iterator[bytes], partial: Path) -> bool:
        with disk_errors(self.folder), open(partial, "wb", buffering=0) as target:
            for piece in pieces:
                target.write(piece)
                if self._stop.is_set():
                    return False
        return True

    def _keep(self, shard: int, partial: Path) -> bool:
        os.replace(partial, self.folder / str(shard))
        self._copies[shard] = None
        return True
