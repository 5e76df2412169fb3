"""Work on an array tile by tile, in a pool of threads.

A thread does the product, the selection and the sums of a whole tile in its own cache, with torch
on one thread inside. So no thread waits for the slowest one between the parts of a pass, which is
expensive where other programs share the machine. The caller stays on one thread meanwhile
(`one_thread`): OpenMP's threads spin after each small operation, which halved the speed there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor


def do_nothing() -> None:
    """Do nothing: the default of callbacks that show that a long pass goes on."""


@dataclass
class Tile:
    """The rows of one tile, read when they are asked for: many passes need few of them."""

    piece: slice
    read: Callable[[slice | Int64[Tensor, " m"]], Float32[Tensor, "m d"]]  # rows at these places

    @functools.cached_property
    def rows(self) -> Float32[Tensor, "m d"]:
        """Return all rows."""
        return self.read(self.piece)

    def take(self, places: Int64[Tensor, " c"]) -> Float32[Tensor, "c d"]:
        """Return copies of the rows at some places of the tile."""
        if "rows" in self.__dict__:
            return self.rows.index_select(0, places)  # 4 times as fast as rows[places]
        return self.read(places + self.piece.start)


def each_tile(
    work: Callable[[int], None],
    n: int,
    size: int,
    threads: int,
    alive: Callable[[], None] = do_nothing,
) -> None:
    """Call `work(start)` for every tile of `size` rows, in any order; raise what it raises.

    `alive` is called in the caller's thread after every tile.
    """
    starts = range(0, n, size)
    if min(threads, len(starts)) < 2:
        for start in starts:
            work(start)
            alive()
        return
    with one_thread():
        for _ in pool(threads).map(work, starts):
            alive()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside, and its former number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that stay: a new one would have to set up torch's kernels again."""
    return ThreadPoolExecutor(threads, "tile", initializer=torch.set_num_threads, initargs=(1,))
