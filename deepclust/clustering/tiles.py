"""Work on an array tile by tile, in several threads of our own.

A thread takes whole tiles through product, selection and sums, all in its own cache, with torch on
one thread inside. So nothing waits for the slowest thread between the parts of a pass, which is
what costs the usual parallel products dearly when the machine has something else to do too. For
the same reason the caller stays on one thread meanwhile (`one_thread`): OpenMP's threads go on
spinning for a while after each small operation, and with a busy neighbour that halved our speed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def each_tile(work: Callable[[int], None], n: int, size: int, threads: int) -> None:
    """Call `work(start)` for every tile of `size` rows, in any order; raises what it raises."""
    starts = range(0, n, size)
    if min(threads, len(starts)) < 2:
        for start in starts:
            work(start)
        return
    with one_thread():
        for _ in pool(threads).map(work, starts):
            pass


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread in this one; afterwards as before, which is later threads' default."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: a new one would have to set up torch's kernels again."""
    return ThreadPoolExecutor(threads, "tile", initializer=torch.set_num_threads, initargs=(1,))
