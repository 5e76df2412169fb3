"""The loader: batches of crops, in the order of their requests, from worker processes.

Every batch is a pure function of its `Request`, so any number of workers gives the same bytes. So
does either way of reading: by offset, for shards on this machine, or by block of shards, for those
on a network.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from deepclust.data.images.decode import MAX_PIXELS
from deepclust.data.loose.index import FileIndex
from deepclust.data.read import sending, shard_cache, worker_processes
from deepclust.data.read.dataset import Bad, Batches, Loaded, Request
from deepclust.data.read.finish import Finisher
from deepclust.data.read.patience import Patience, Watch
from deepclust.data.read.sending import Sender, Sent
from deepclust.data.read.substitutes import Labels
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import Interrupted
from deepclust.data.shards.url import Url
from deepclust.errors import DeepclustError, RecipeError, RequeueWanted, ResourceError

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
        patience: Patience | None = None,
        labels: Labels | None = None,
        decode: str = "cpu",
        device: torch.device | None = None,
    ) -> None:
        """Open nothing yet.

        `prefetch` is the number of batches under way per worker. `scratch` is a local folder for
        the cache of shards that reading by block needs. `patience` limits each wait. By
        `labels` a labelled sample that cannot be read is replaced by another of its class. With
        `decode` "gpu" images are crops on `device` (the present GPU), which decodes JPEGs. With
        "reduced" large JPEGs are decoded as small as their crops allow (`reduced.py`). Raises
        `ResourceError` where it cannot, `RecipeError` for an unknown `read` or fewer than 0
        workers, and `DiskError` for a `scratch` that cannot be written.
        """
        if read not in READS or workers < 0 or prefetch < 1:
            raise RecipeError(
                f"data.read is one of {', '.join(READS)}, data.workers at least 0, prefetch at "
                f"least 1; got {read!r}, {workers}, {prefetch}"
            )
        self.waited = 0.0
        self.patience = patience or Patience()
        self.cache = _make_cache(index, read, scratch, self.patience)
        self._requests = _Requests()
        folder = self.cache.folder if self.cache else None
        self._batches = Batches(index, folder, max_pixels, labels, decode)
        self._finisher = Finisher(self._batches, device) if decode == "gpu" else None
        self._batches.files.stopped = self.patience.stopping
        self._workers, self._prefetch = workers, prefetch
        self._loader: DataLoader[Sent] | None = None
        self._processes: list[BaseProcess] = []
        self._watch: Watch | None = None
        self._warned = False
        self._active: object = None
        self._failed: Exception | None = None  # in the requests of the present stream
        weakref.finalize(self, _clean_up, self._processes, self.cache)

    def stream(self, requests: Iterable[Request]) -> Iterator[Loaded]:
        """Load the requests in order, taken lazily, `prefetch` ahead per worker.

        A new stream ends the one before it, and leaving one early costs nothing. Raises
        `ResourceError` if a worker died or nothing came within the patience. Raises
        `RequeueWanted` if nothing came after a request to stop, and `DataError` as `Batches` does.
        """
        self._active = token = object()
        batches = self._start(requests)
        try:
            while (loaded := self._next(batches)) is not None:
                yield self._finished(loaded)
                assert self._active is token, "this stream was ended by a newer one"
        finally:
            if self._active is token:
                self._end_requests()

    def close(self) -> None:
        """End the processes and delete the copies of shards."""
        self._stop()
        if self.cache is not None:
            self.cache.close()

    def _start(self, requests: Iterable[Request]) -> Iterator[Sent]:
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
            if self._loader is None:
                return self._start_workers()
            with self._awaited():
                return iter(self._loader)
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

    def _start_workers(self) -> Iterator[Sent]:
        if not self._workers:
            self._loader = self._torch_loader(self._batches)
            return iter(self._loader)
        sending.check_semaphores(self._workers)
        up, ready = multiprocessing.Pipe(duplex=False)
        self.patience.let_start(up, self._workers)
        self._loader = self._torch_loader(
            Sender(self._batches),
            worker_init_fn=partial(worker_processes.set_up, ready),
            multiprocessing_context="forkserver",
            prefetch_factor=self._prefetch,
            persistent_workers=True,
        )
        try:
            with worker_processes.collect_started(self._processes), _unwarned():
                batches = iter(self._loader)
        except (OSError, MemoryError, EOFError) as error:
            self._stop()
            raise sending.shortage(error) from error
        self._watch = Watch(self._processes, self.patience)
        return batches

    def _torch_loader(self, batches: Batches | Sender, **for_workers: Any) -> DataLoader[Sent]:
        with _unwarned():
            return DataLoader(
                batches,
                batch_size=None,
                sampler=self._requests,
                num_workers=self._workers,
                collate_fn=_unchanged,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else it draws from, and so moves, the global one
                **for_workers,
            )

    def _next(self, batches: Iterator[Sent]) -> Loaded | None:
        """Return the next batch, None after the last one."""
        started = time.perf_counter()
        try:
            with self._awaited():
                sent = next(batches, None)
        finally:
            self.waited += time.perf_counter() - started
        if isinstance(sent, DeepclustError):
            raise sent
        if sent is None and self._failed is not None:
            raise self._failed
        if sent is None:
            return None
        if self.cache is not None:
            self.cache.release_oldest()
        if sent.in_pipe and not self._warned:
            self._warned = True
            logging.getLogger("deepclust").warning(sending.pipe_warning(sent))
        return sending.received(sent)

    def _finished(self, loaded: Loaded) -> Loaded:
        """Return the batch with its JPEGs decoded, where workers leave that to a GPU."""
        if self._finisher is None:
            return loaded
        with self._awaited():  # a substitute may have to be read
            return self._finisher.finished(loaded)

    @contextlib.contextmanager
    def _awaited(self) -> Iterator[None]:
        """Limit the wait in the block, and raise what has become of the worker processes."""
        try:
            with self.patience.waiting():
                yield
        except Interrupted:
            raise RequeueWanted(
                "stopped while the storage of the shards failed; resume goes on from the last "
                "checkpoint"
            ) from None
        except (RuntimeError, OSError, EOFError) as error:  # torch has noticed, or a pipe broke
            if isinstance(error, DeepclustError):
                raise
            reason = self._reason(error)
            if reason is None:
                raise
            self._stop()
            raise reason from error

    def _reason(self, error: Exception) -> DeepclustError | None:
        """Return what an error of torch's means here, None for one of the work itself."""
        if self._watch is not None and self._watch.reason is not None:
            return self._watch.reason
        if worker_processes.any_dead(self._processes):
            return ResourceError(worker_processes.explain_dead(self._processes))
        return sending.shortage(error) if sending.lacks_files(error) else None

    def _end_requests(self) -> None:
        current = self._requests.current
        if hasattr(current, "close"):
            current.close()

    def _stop(self) -> None:
        self._end_requests()
        self._loader = None
        self.patience.end_start()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        worker_processes.end(self._processes)
        self._processes.clear()
        self._batches.files.close()


def resolve_read(index: Index, read: str, mirror: bool = False) -> str:
    """Return what `auto` means for these shards on this machine: "offset" or "block".

    `mirror` says that they will be copied to this machine first (`data.stage`). That changes no
    order, so `auto` is what it would be without it. But an image of a remote shard may then be
    read by its offset, which is a `RecipeError` without a mirror.
    """
    if isinstance(index, FileIndex):
        if read == "block":
            raise RecipeError(
                f"data.read=block copies shards, and {index.places[0].path} holds image files: "
                "leave it at auto, or make shards of them with `deepclust pack`"
            )
        return "offset"
    if read == "auto":
        return "block" if shard_cache.on_network(index.shards[0]) else "offset"
    if read == "offset" and isinstance(index.shards[0], Url) and not mirror:
        raise RecipeError(
            f"data.read=offset would make a request to {index.shards[0].parent} for every image: "
            "leave it at auto (whole shards, by block), or copy them first with data.stage=FOLDER"
        )
    return read


def _make_cache(
    index: Index, read: str, scratch: str | Path | None, patience: Patience
) -> shard_cache.ShardCache | None:
    if resolve_read(index, read) == "offset":
        return None
    folder = Path(scratch or tempfile.gettempdir())
    return shard_cache.ShardCache(index, folder, patience=patience)


def _clean_up(processes: list[BaseProcess], cache: shard_cache.ShardCache | None) -> None:
    worker_processes.end(processes)
    if cache is not None:
        cache.close()


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Keep torch from warning of more readers than cores: `deepclust doctor` says how many fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _unchanged(sent: Any) -> Any:
    return sent
