"""The mirror: copies of all shards on a node's own disk (`data.stage`), made before any is read.

Ranks of a node share it: one copies, the others wait. FOLDER/deepclust-<fingerprint>/ holds the
shards under their base names. NAME.part is an unfinished copy, which a later start continues. DONE
has a line for each copy that was checked against the index: its size, and the digest of its
members. A later start looks at size and time only, and copies again what differs. Copies of other
data sets are never touched: delete their folders when you need the space.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepclust.data.loose.index import FileIndex
from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards import remote
from deepclust.data.shards.file_lock import held
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import Interrupted
from deepclust.data.shards.scan import scan
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError, DiskError, RecipeError, RequeueWanted
from deepclust.files import append_json, disk_errors, read_jsonl, sync
from deepclust.world import ALONE, World

_THREADS = 4
_SYNC_S = 1.0  # between two collectives of the ranks that wait
_LOG_S = 10.0  # between two lines in the log
_BUSY, _ASKED, _FAILED = 1, 2, 3  # the largest of the ranks' states decides for all


def mirror_shards(
    index: Index,
    folder: str | Path | None,
    world: World = ALONE,
    stopping: Callable[[], bool] = remote.never,
    alive: Callable[[], None] = lambda: None,
) -> Index:
    """Copy the shards to `folder` and return the index over the copies, on all ranks together.

    The ranks agree every second while one still copies, so that no collective times out because a
    node is slow. `alive` is called while the mirror grows. Raises `DataError` for a shard that
    cannot be read or is not what was indexed. Raises `DiskError` when there is too little room, and
    `RequeueWanted` when a rank was asked to stop.
    """
    if folder is None:
        return index
    if isinstance(index, FileIndex):
        raise RecipeError(
            f"data.stage copies shards, and {index.places[0].path} holds image files: leave it "
            "out, or make shards of them with `deepclust pack`"
        )
    mirror_dir = Path(folder).absolute() / f"deepclust-{index.fingerprint}"
    left, size = threading.Event(), -1
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(copy_all, index, mirror_dir, left.is_set)
        try:
            while state := world.max_int(_state(work, stopping)):
                if state == _FAILED:
                    left.set()
                    world.raise_all(_error(work), "data.stage")
                if state == _ASKED:
                    raise RequeueWanted("stopped while copying shards; finished copies are kept")
                before, size = size, _bytes_in(mirror_dir)
                if size != before or work.done():
                    alive()
                wait([work], timeout=_SYNC_S)
        finally:
            left.set()
    return index.copied_to([mirror_dir / shard.name for shard in _indexed(index)])


def _state(work: Future[None], stopping: Callable[[], bool]) -> int:
    if work.done():
        return _FAILED if work.exception() else 0
    return _ASKED if stopping() else _BUSY


def _error(work: Future[None]) -> Exception | None:
    error = work.exception() if work.done() else None
    assert error is None or isinstance(error, Exception)
    return error


def _bytes_in(folder: Path) -> int:
    """Return the bytes of a folder's files, whichever process of this node writes them."""
    # the folder is not there yet, or a part was renamed just now
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries)
    return -1


def copy_all(index: Index, mirror_dir: Path, stopped: Callable[[], bool] = remote.never) -> None:
    """Copy the shards that `mirror_dir` lacks, or wait while another process of this node does."""
    with disk_errors(mirror_dir):
        mirror_dir.mkdir(parents=True, exist_ok=True)
    with held(mirror_dir / ".lock", f"copies shards to {mirror_dir}", stopped):
        missing = _missing(_indexed(index), mirror_dir)
        _check_room(missing, mirror_dir)
        if missing:
            _Copier(mirror_dir, stopped).run(missing)


@dataclass(frozen=True)
class _Indexed:
    """A shard as the index knows it: source, size in bytes, and digest of its members.

    `name` is the base name of its copy.
    """

    source: Source
    size: int
    digest: str
    name: str


def _indexed(index: Index) -> list[_Indexed]:
    pairs = zip(index.shards, index.manifest["shards"], strict=True)
    return [
        _Indexed(source, entry["size"], entry["digest"], entry["name"].replace("/", "%2F"))
        for source, entry in pairs
    ]


def _missing(shards: list[_Indexed], mirror_dir: Path) -> list[_Indexed]:
    """Return those without a copy that was checked and is unchanged since."""
    done = {entry["name"]: entry for entry in read_jsonl(mirror_dir / "DONE")}
    return [shard for shard in shards if _entry(mirror_dir / shard.name) != done.get(shard.name)]


def _entry(copy: Path) -> dict[str, Any]:
    """Return the line of DONE for a copy, empty if the copy does not exist."""
    if not copy.exists():
        return {}
    about = copy.stat()
    return {"name": copy.name, "size": about.st_size, "mtime_ns": about.st_mtime_ns}


def _check_room(missing: list[_Indexed], mirror_dir: Path) -> None:
    """Raise `DiskError` if what is missing does not fit."""
    parts = [_part(mirror_dir, shard) for shard in missing]
    there = sum(part.stat().st_size for part in parts if part.exists())
    there += sum(_entry(mirror_dir / shard.name).get("size", 0) for shard in missing)  # replaced
    needed = sum(shard.size for shard in missing) - there
    disk = os.statvfs(mirror_dir)
    if needed > (free := disk.f_bavail * disk.f_frsize):
        raise DiskError(
            f"data.stage: {len(missing)} shards need {needed / 1e9:.2f} GB more in {mirror_dir} "
            f"and {free / 1e9:.2f} GB are free. Free some, choose a larger disk, or leave "
            "data.stage out: reading by block keeps few copies at a time."
        )


def _part(mirror_dir: Path, shard: _Indexed) -> Path:
    return mirror_dir / f"{shard.name}.part"


class _Copier:
    """Copies of shards in a few threads, with their progress in the log."""

    def __init__(self, mirror_dir: Path, stopped: Callable[[], bool]) -> None:
        self.mirror_dir, self.copied, self._counting = mirror_dir, 0, threading.Lock()
        self._asked, self._left = stopped, threading.Event()
        self._began = self._logged = time.monotonic()

    def run(self, missing: list[_Indexed]) -> None:
        """Copy all, until the first error."""
        total = sum(shard.size for shard in missing)
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                left = {pool.submit(self._copy, shard) for shard in missing}
                while left:
                    done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                    for copy in done:  # one at a time, in this thread
                        append_json(self.mirror_dir / "DONE", _entry(copy.result()))
                    self._log_progress(total, final=not left)
            finally:
                self._left.set()
                pool.shutdown(cancel_futures=True)

    def _copy(self, shard: _Indexed) -> Path:
        """Return the checked copy, fetched once more from its first byte if it is wrong."""
        part, copy = _part(self.mirror_dir, shard), self.mirror_dir / shard.name
        with disk_errors(self.mirror_dir):
            copy.unlink(missing_ok=True)  # changed since it was checked
            for _ in range(2):
                self._fetch(shard, part)
                if (wrong := _find_fault(part, shard)) is None:
                    sync(part)
                    os.replace(part, copy)
                    return copy
                part.unlink()
        raise DataError(
            f"shard {shard.source} was copied to {self.mirror_dir} twice and is not what was "
            f"indexed: {wrong}. Restore the old one, or index the new ones with `deepclust "
            "index`."
        )

    def _fetch(self, shard: _Indexed, part: Path) -> None:
        """Fetch what the partial copy lacks."""
        if part.exists() and part.stat().st_size > shard.size:
            part.unlink()
        with (
            open(part, "ab", buffering=0) as file,
            contextlib.closing(_pieces(shard, file.tell(), self._stopped)) as pieces,
        ):
            for piece in pieces:
                if self._stopped():
                    raise Interrupted
                file.write(piece)
                with self._counting:
                    self.copied += len(piece)

    def _stopped(self) -> bool:
        return self._left.is_set() or self._asked()

    def _log_progress(self, total: int, final: bool) -> None:
        now = time.monotonic()
        if not final and now - self._logged < _LOG_S:
            return
        self._logged = now
        logging.getLogger("deepclust").info(
            "copied %.2f of %.2f GB to %s, %.0f MB/s",
            self.copied / 1e9,
            total / 1e9,
            self.mirror_dir,
            self.copied / 1e6 / (now - self._began),
        )


def _pieces(
    shard: _Indexed, start: int, stopped: Callable[[], bool]
) -> Generator[bytes, None, None]:
    if isinstance(shard.source, Url):
        yield from remote.stream(shard.source, start, shard.size, stopped)
    else:
        yield from _local_pieces(shard, start, stopped)


def _local_pieces(shard: _Indexed, start: int, stopped: Callable[[], bool]) -> Iterator[bytes]:
    with contextlib.closing(ShardFiles([shard.source])) as files:
        files.stopped = stopped
        for at in range(start, shard.size, remote.CHUNK):
            yield files.read(0, at, min(remote.CHUNK, shard.size - at))


def _find_fault(part: Path, shard: _Indexed) -> str | None:
    """Compare a whole copy with the index, and return what differs."""
    if (size := part.stat().st_size) != shard.size:
        return f"it has {size} bytes, not {shard.size}"
    try:
        digest = scan(part).digest
    except DataError as error:
        return str(error)
    return None if digest == shard.digest else "it holds other members"
