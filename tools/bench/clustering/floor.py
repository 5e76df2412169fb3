"""The arithmetic floor: the fastest float32 product of the same shape, and nothing else.

k-means with float32 distances computes rows x centroids once a pass. We time that product alone,
in the ways that a library could: by torch or NumPy, whole or in tiles that stay in the cache, with
the library's threads or with one-threaded products in as many Python threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import processes
import torch
from threadpoolctl import threadpool_limits

TILE = 1024


def measure(job: dict) -> dict:
    """Seconds of (iterations + 1) passes for every way, and the best of them."""
    rows = np.array(np.load(job["rows"], mmap_mode="r"), np.float32)
    columns = np.ascontiguousarray(rows[np.load(job["ids"])].T)
    passes = job["iterations"] + 1
    ways = {
        "numpy, whole": lambda: whole(np.dot, rows, columns, passes),
        "numpy, tiles": lambda: tiles(np.dot, rows, columns, passes),
        "torch, whole": lambda: whole(torch.mm, *tensors(rows, columns), passes),
        "torch, tiles": lambda: tiles(torch.mm, *tensors(rows, columns), passes),
        "torch, a thread a core": lambda: threads(torch.mm, *tensors(rows, columns), passes),
        "numpy, a thread a core": lambda: threads(np.dot, rows, columns, passes),
    }
    found = {name: way() for name, way in ways.items()}
    environment = processes.environment()
    return {"seconds": min(found.values()), "ways": found, "environment": environment}


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    """The same memory as tensors."""
    return [torch.from_numpy(array) for array in arrays]


def timed(one_pass: Callable[[], object], passes: int) -> float:
    """Seconds of so many passes after one that isn't counted."""
    one_pass()
    began = time.perf_counter()
    for _ in range(passes):
        one_pass()
    return time.perf_counter() - began


def empty_like(rows, count: int, k: int):
    """Room for scores, of the kind of `rows`."""
    room = np.empty((count, k), np.float32)
    return torch.from_numpy(room) if isinstance(rows, torch.Tensor) else room


def whole(product: Callable, rows, columns, passes: int) -> float:
    """One product of all rows."""
    room = empty_like(rows, len(rows), columns.shape[1])
    return timed(lambda: product(rows, columns, out=room), passes)


def walk(product: Callable, rows, columns, starts: range) -> None:
    """Products of tiles into the same room."""
    room = empty_like(rows, TILE, columns.shape[1])
    for at in starts:
        part = rows[at : at + TILE]
        product(part, columns, out=room[: len(part)])


def tiles(product: Callable, rows, columns, passes: int) -> float:
    """One product a tile of 1024 rows."""
    return timed(lambda: walk(product, rows, columns, range(0, len(rows), TILE)), passes)


def threads(product: Callable, rows, columns, passes: int) -> float:
    """One-threaded products of tiles, in as many Python threads as torch has."""
    count = torch.get_num_threads()
    shares = [range(i * TILE, len(rows), count * TILE) for i in range(count)]
    with (
        threadpool_limits(1),
        ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):

        def one_pass() -> None:
            for done in [pool.submit(walk, product, rows, columns, share) for share in shares]:
                done.result()

        seconds = timed(one_pass, passes)
    torch.set_num_threads(count)
    return seconds
