"""The loader: batches of crops, in the order of their requests, from worker processes.

Every batch is a pure function of its `Request`, so any number of workers gives the same bytes. So
does either way of reading: by offset, for shards on this machine, or by block of shards, for those
on a network.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from deepclust.data.images.decode import MAX_PIXELS
from deepclust.data.read import shard_cache, worker_processes
from deepclust.data.read.dataset import Bad, Batches, Loaded, Request
from deepclust.data.shards.index import Index
from deepclust.data.shards.url import Url
from deepclust.errors import RecipeError, ResourceError

__all__ = ["Bad", "Loaded", "Loader", "Request", "resolve_read"]

READS = ("auto", "offset", "block")


class _Requests:
    """The DataLoader's sampler: the requests of the present stream."""

    def __init__(self) -> None:
        self.current: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.current


class Loader:
    """A reader of streams of requests, one after another, with `workers` processes (0: this one).

    `waited` is the time that `stream` has kept its consumer waiting, seconds. With a GPU, images
    are in page-locked memory. Processes start with the first stream and stay until `close`.
    """

    def __init__(
        self,
        index: Index,
        workers: int,
        read: str = "auto",
        scratch: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
    ) -> None:
        """Open nothing yet.

        `prefetch` is the number of batches under way per worker. `scratch` is a local folder for
        the cache of shards that reading by block needs. Raises `RecipeError` for an unknown `read`
        or fewer than 0 workers, and `DiskError` for a `scratch` that cannot be written.
        """
        if read not in READS or workers < 0 or prefetch < 1:
            raise RecipeError(
                f"data.read is one of {', '.join(READS)}, data.workers at least 0, prefetch at "
                f"least 1; got {read!r}, {workers}, {prefetch}"
            )
        self.waited = 0.0
        self.cache = _make_cache(index, read, scratch)
        self._requests = _Requests()
        self._batches = Batches(index, self.cache.folder if self.cache else None, max_pixels)
        self._workers, self._prefetch = workers, prefetch
        self._loader: DataLoader[Loaded] | None = None
        self._processes: list[BaseProcess] = []
        self._active: object = None
        self._failed: Exception | None = None  # in the requests of the present stream
        weakref.finalize(self, _clean_up, self._processes, self.cache)

    def stream(self, requests: Iterable[Request]) -> Iterator[Loaded]:
        """Load the requests in order, taken lazily, `prefetch` ahead per worker.

        A new stream ends the one before it, and leaving one early costs nothing. Raises
        `ResourceError` if a worker died, and `DataError` as `Batches` does.
        """
        self._active = token = object()
        batches = self._start(requests)
        try:
            while (loaded := self._next(batches)) is not None:
                yield loaded
                assert self._active is token, "this stream was ended by a newer one"
        finally:
            if self._active is token:
                self._end_requests()

    def close(self) -> None:
        """End the processes and delete the copies of shards."""
        self._stop()
        if self.cache is not None:
            self.cache.close()

    def _start(self, requests: Iterable[Request]) -> Iterator[Loaded]:
        started = time.perf_counter()
        self._end_requests()
        self._failed = None
        taken = iter(requests if self.cache is None else self.cache.stream(requests))
        self._requests.current = taken
        try:
            first = next(taken, None)
            if first is None:
                return iter(())
            self._requests.current = self._until_error(first, taken)
            if self._loader is not None:
                return iter(self._loader)
            return self._start_workers()
        finally:
            self.waited += time.perf_counter() - started

    def _until_error(self, first: Request, rest: Iterator[Request]) -> Iterator[Request]:
        """Yield the requests up to an error in them, which `_next` raises after the last batch."""
        # raised inside torch's iterator it would leave processes and queues half made, as would a
        # stream without any request, for which nothing is started
        try:
            yield first
            yield from rest
        except Exception as error:
            self._failed = error

    def _start_workers(self) -> Iterator[Loaded]:
        parallel = self._workers > 0
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._requests,
            num_workers=self._workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=worker_processes.set_up if parallel else None,
            multiprocessing_context="forkserver" if parallel else None,
            generator=torch.Generator(),  # else it draws from, and so moves, the global one
            prefetch_factor=self._prefetch if parallel else None,
            persistent_workers=parallel,
        )
        if not parallel:
            return iter(self._loader)
        with worker_processes.collect_started() as started:
            batches = iter(self._loader)
        self._processes += started
        return batches

    def _next(self, batches: Iterator[Loaded]) -> Loaded | None:
        """Return the next batch, None after the last one."""
        started = time.perf_counter()
        try:
            loaded = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:  # torch has noticed, or a pipe broke
            if not worker_processes.any_dead(self._processes):
                raise
            reason = worker_processes.explain_dead(self._processes)
            self._stop()
            raise ResourceError(reason) from error
        finally:
            self.waited += time.perf_counter() - started
        if loaded is None and self._failed is not None:
            raise self._failed
        if loaded is not None and self.cache is not None:
            self.cache.release_oldest()
        return loaded

    def _end_requests(self) -> None:
        current = self._requests.current
        if hasattr(current, "close"):
            current.close()

    def _stop(self) -> None:
        self._end_requests()
        self._loader = None
        worker_processes.end(self._processes)
        self._processes.clear()
        self._batches.files.close()


def resolve_read(index: Index, read: str, mirror: bool = False) -> str:
    """Return what `auto` means for these shards on this machine: "offset" or "block".

    `mirror` says that they will be copied to this machine first (`data.stage`). That changes no
    order, so `auto` is what it would be without it. But an image of a remote shard may then be
    read by its offset, which is a `RecipeError` without a mirror.
    """
    if read == "auto":
        return "block" if shard_cache.on_network(index.shards[0]) else "offset"
    if read == "offset" and isinstance(index.shards[0], Url) and not mirror:
        raise RecipeError(
            f"data.read=offset would make a request to {index.shards[0].parent} for every image: "
            "leave it at auto (whole shards, by block), or copy them first with data.stage=FOLDER"
        )
    return read


def _make_cache(
    index: Index, read: str, scratch: str | Path | None
) -> shard_cache.ShardCache | None:
    if resolve_read(index, read) == "offset":
        return None
    return shard_cache.ShardCache(index, Path(scratch or tempfile.gettempdir()))


def _clean_up(processes: list[BaseProcess], cache: shard_cache.ShardCache | None) -> None:
    worker_processes.end(processes)
    if cache is not None:
        cache.close()


def _unchanged(loaded: Any) -> Any:
    return loaded
