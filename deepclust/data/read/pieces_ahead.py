"""Remote shards that are copied one after another: the next is asked for before the last has come.

A request for bytes comes back after a round trip, and a connection that rested is slow at first. A
link would idle at the end of every shard, the more the smaller shards are. So there are requests
for the shards to come while a shard is written, and their pieces wait in memory, at most `UNREAD`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from deepclust.data.shards import remote
from deepclust.data.shards.index import Index
from deepclust.data.shards.url import Url

UNREAD = remote.WINDOW + 2  # pieces of `remote.CHUNK` bytes that are asked for or wait


@dataclass
class _Wanted:
    """A shard that will be copied: what is not yet asked for, and what is."""

    shard: int
    left: deque[tuple[int, int]]  # offset and size of pieces
    asked: deque[Future[bytes]] = field(default_factory=deque)
    dropped: threading.Event = field(default_factory=threading.Event)

    @property
    def count(self) -> int:
        """The pieces that are to be taken."""
        return len(self.left) + len(self.asked)


class PiecesAhead:
    """The bytes of remote shards, in the order in which the shards are wanted.

    For one thread. Reads end soon after `stopped()` becomes true.
    """

    def __init__(self, index: Index, stopped: Callable[[], bool]) -> None:
        self._index, self._stopped = index, stopped
        self._wanted: deque[_Wanted] = deque()
        self._pool = ThreadPoolExecutor(remote.WINDOW)

    @property
    def is_full(self) -> bool:
        """Whether as much is wanted as may be asked for."""
        return sum(one.count for one in self._wanted) >= UNREAD

    def want(self, shards: Sequence[int]) -> None:
        """Ask for these shards after those before; what is wanted already, or a file, is not."""
        known = {one.shard for one in self._wanted}
        for shard in shards:
            if shard not in known and isinstance(self._index.shards[shard], Url):
                self._wanted.append(self._new(shard))
        self._ask()

    def take(self, shard: int) -> Iterator[bytes]:
        """Yield the pieces of a remote shard, and drop those that were wanted before it.

        Raises `UnreachableError`, and `Interrupted` once `stopped()` is true.
        """
        if shard not in [one.shard for one in self._wanted]:
            self._wanted.appendleft(self._new(shard))
        while self._wanted[0].shard != shard:
            self._drop_first()
        one = self._wanted[0]
        try:
            while one.count:
                self._ask()
                yield one.asked.popleft().result()
        finally:
            self._drop_first()
            self._ask()

    def close(self) -> None:
        """Drop all that is wanted, and end the threads."""
        while self._wanted:
            self._drop_first()
        self._pool.shutdown()

    def _new(self, shard: int) -> _Wanted:
        size, step = self._index.lengths[shard], remote.CHUNK
        return _Wanted(shard, deque((at, min(step, size - at)) for at in range(0, size, step)))

    def _ask(self) -> None:
        free = UNREAD - sum(len(one.asked) for one in self._wanted)
        for one in self._wanted:
            # one that came in before the others does not wait for their places
            least = remote.WINDOW - len(one.asked) if one is self._wanted[0] else 0
            for _ in range(min(len(one.left), max(free, least))):
                one.asked.append(self._pool.submit(self._read, one, *one.left.popleft()))
                free -= 1

    def _read(self, one: _Wanted, offset: int, size: int) -> bytes:
        source = self._index.shards[one.shard]
        assert isinstance(source, Url)
        return remote.read(source, offset, size, lambda: one.dropped.is_set() or self._stopped())

    def _drop_first(self) -> None:
        one = self._wanted.popleft()
        one.dropped.set()
        for piece in one.asked:
            piece.cancel()
