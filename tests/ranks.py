"""Run a function on several ranks: forks of the warm process of `forks.py`, used by all tests.

results = on_ranks(3, work, *args)     # work(world, *args) at module level; a result per rank
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from deepclust.launch.warm import Fork
from tests.forks import server

MOST = 3
MEET_S = 300.0  # until ranks are connected, on a machine that does much else


def on_ranks(size: int, work: Callable[..., Any], *args: Any, limit: float = 60) -> list[Any]:
    """`work(world, *args)` on `size` ranks that meet through gloo; raises the first error.

    `limit`: seconds that a collective may take.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [pipe for pipe, *_ in _pool()[:size]]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, size, str(Path(folder, "rendezvous")), limit, work, args))
        return _results(pipes)


def _results(pipes: list[Connection]) -> list[Any]:
    """Each rank's result, or the error of the first that fails: others may wait for it for ever."""
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for pipe in pipes if pipe not in results]):
            assert isinstance(pipe, Connection)
            try:
                results[pipe], error = pipe.recv()
            except (EOFError, OSError) as end:
                output = [out.read_text()[-2000:] for _, _, out in _pool()]
                _end_pool()
                raise AssertionError(f"a rank ended: {output}") from end
            if error is not None:
                _end_pool()
                raised = results[pipe]
                raise AssertionError(f"a rank failed: {error}") from (
                    raised if isinstance(raised, Exception) else None
                )
    return [results[pipe] for pipe in pipes]


@functools.cache
def _pool() -> list[tuple[Connection, Fork, Path]]:
    key = multiprocessing.current_process().authkey.hex()  # for tensors, which go by descriptors
    ranks, folder = [], Path(tempfile.mkdtemp(prefix="ranks-"))
    for number in range(MOST):
        ours, theirs = multiprocessing.Pipe()
        with theirs, (folder / str(number)).open("wb") as out:
            files = [out.fileno(), out.fileno(), theirs.fileno()]
            fork = server().fork("tests.ranks:be_rank", [key], files)
        ranks.append((ours, fork, folder / str(number)))
    return ranks


@atexit.register
def _end_pool() -> None:
    """End the ranks; the next call starts others."""
    for _, process, out in _pool() if _pool.cache_info().currsize else []:
        process.kill()
        shutil.rmtree(out.parent, ignore_errors=True)
    _pool.cache_clear()


def be_rank(words: list[str], files: list[int]) -> None:
    """Serve until the tests end."""
    import torch
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from deepclust.world import close_process_group, join

    torch.set_num_threads(1)
    multiprocessing.current_process().authkey = bytes.fromhex(words[0])
    pipe = Connection(files[0])
    while True:
        rank, size, rendezvous, limit, work, args = pipe.recv()
        try:
            world = join(rank, size, rendezvous, torch.device("cpu"), MEET_S)
            if size > 1:  # once they are connected
                _set_pg_timeout(timedelta(seconds=limit))
            result = work(world, *args)
            world.barrier()  # or who is done early leaves while the others still meet
            pipe.send((result, None))
        except Exception as error:
            pipe.send((error, traceback.format_exc()))
        finally:
            close_process_group()
