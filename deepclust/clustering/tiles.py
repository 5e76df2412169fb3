"""Work on an array tile by tile, in as many threads as torch has been given.

A thread takes whole tiles through product, selection and sums, all in its own cache, with torch on
one thread inside. So nothing waits for the slowest thread between the parts of a pass, which is
what costs the usual parallel products dearly when the machine has something else to do too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def each_tile(work: Callable[[int], None], n: int, size: int, device: torch.device) -> None:
    """Call `work(start)` for every tile of `size` rows, in any order; raises what it raises."""
    starts = range(0, n, size)
    allowed = torch.get_num_threads()
    if device.type != "cpu" or min(allowed, len(starts)) < 2:
        for start in starts:
            work(start)
        return
    try:
        for _ in threads(allowed).map(work, starts):
            pass
    finally:
        torch.set_num_threads(allowed)  # a thread's setting is also the default of later threads


@functools.cache
def threads(count: int) -> ThreadPoolExecutor:
    """Threads that stay: a new one would have to set up torch's kernels again."""
    return ThreadPoolExecutor(count, "tile", initializer=torch.set_num_threads, initargs=(1,))
