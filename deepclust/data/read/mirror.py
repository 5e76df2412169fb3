"""Copies of all shards on a node's own disk (`data.stage`), made before anything is read.

Ranks of a node share them: one copies, the others wait. DIR/deepclust-<fingerprint>/ holds the
shards under their base names, NAME.part while one is fetched (a killed copier's is continued), and
DONE, a line for each copy that was checked against the index: its size, and the digest of its
members. A later start looks at size and time only, and copies again what differs. Copies of other
data sets are never touched: delete their folders when the space is wanted.
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

from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards import remote
from deepclust.data.shards.file_lock import TELL_S, held
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import Interrupted
from deepclust.data.shards.scan import scan
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError, DiskError, RequeueWanted
from deepclust.files import append_json, disk_errors, read_jsonl, sync
from deepclust.world import ALONE, World

_THREADS = 4
_MEET_S = 1.0


def mirror_shards(
    index: Index,
    folder: str | Path | None,
    world: World = ALONE,
    stopping: Callable[[], bool] = remote.never,
) -> Index:
    """The same index over the copies in `folder`; all ranks leave together.

    The ranks meet every second while one still copies, so that no collective of theirs times out
    because a node is slow. Raises `DataError` for a shard that cannot be had or is not what was
    indexed, `DiskError` when there is too little room, `RequeueWanted` when one was asked to stop.
    """
    if folder is None:
        return index
    place, left = Path(folder).absolute() / f"deepclust-{index.fingerprint}", threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(copy_all, index, place, left.is_set)
        try:
            while state := world.max_int(_state(work, stopping)):
                if state == _FAILED:
                    left.set()
                    world.raise_all(_error(work), "data.stage")
                if state == _ASKED:
                    raise RequeueWanted("stopped while shards were copied; what is there is kept")
                wait([work], timeout=_MEET_S)
        finally:
            left.set()
    return Index(index.folder, [place / shard.name for shard in index.shards])


_BUSY, _ASKED, _FAILED = 1, 2, 3  # the worst of the ranks' states decides


def _state(work: Future[None], stopping: Callable[[], bool]) -> int:
    if work.done():
        return _FAILED if work.exception() else 0
    return _ASKED if stopping() else _BUSY


def _error(work: Future[None]) -> Exception | None:
    error = work.exception() if work.done() else None
    assert error is None or isinstance(error, Exception)
    return error


def copy_all(index: Index, place: Path, stopped: Callable[[], bool] = remote.never) -> None:
    """Copy the shards that `place` lacks, unless another process of this node does; see above."""
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    with held(place / ".lock", f"copies shards to {place}", stopped):
        missing = _missing(_wanted(index), place)
        _check_room(missing, place)
        if missing:
            _Copier(place, stopped).run(missing)


@dataclass(frozen=True)
class _Wanted:
    """A shard as the index knows it: where from, how many bytes, and its members' digest."""

    source: Source
    size: int
    digest: str


def _wanted(index: Index) -> list[_Wanted]:
    pairs = zip(index.shards, index.manifest["shards"], strict=True)
    return [_Wanted(source, one["size"], one["digest"]) for source, one in pairs]


def _missing(wanted: list[_Wanted], place: Path) -> list[_Wanted]:
    """Those without a copy that was checked, and is as it was then."""
    done = {entry["name"]: entry for entry in read_jsonl(place / "DONE")}
    return [one for one in wanted if _entry(place / one.source.name) != done.get(one.source.name)]


def _entry(copy: Path) -> dict[str, Any]:
    """What DONE says of a copy that is there."""
    if not copy.exists():
        return {}
    about = copy.stat()
    return {"name": copy.name, "size": about.st_size, "mtime_ns": about.st_mtime_ns}


def _check_room(missing: list[_Wanted], place: Path) -> None:
    """Raise `DiskError` if what is missing does not fit."""
    there = sum(_part(place, one).stat().st_size for one in missing if _part(place, one).exists())
    there += sum(_entry(place / one.source.name).get("size", 0) for one in missing)  # replaced
    needed = sum(one.size for one in missing) - there
    disk = os.statvfs(place)
    if needed > (free := disk.f_bavail * disk.f_frsize):
        raise DiskError(
            f"data.stage: {len(missing)} shards need {needed / 1e9:.2f} GB more in {place} and "
            f"{free / 1e9:.2f} GB are free. Free some, choose a larger disk, or leave data.stage "
            "out: reading by block keeps few copies at a time."
        )


def _part(place: Path, one: _Wanted) -> Path:
    return place / f"{one.source.name}.part"


class _Copier:
    """Copies shards in a few threads, and tells how far it is."""

    def __init__(self, place: Path, stopped: Callable[[], bool]) -> None:
        self.place, self.copied, self._counting = place, 0, threading.Lock()
        self._asked, self._left = stopped, threading.Event()
        self._began = self._told = time.monotonic()

    def run(self, missing: list[_Wanted]) -> None:
        """Copy all; the first error ends the others."""
        total = sum(one.size for one in missing)
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                left = {pool.submit(self._copy, one) for one in missing}
                while left:
                    done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                    for one in done:  # one at a time, in this thread
                        append_json(self.place / "DONE", _entry(one.result()))
                    self._tell(total, final=not left)
            finally:
                self._left.set()
                pool.shutdown(cancel_futures=True)

    def _copy(self, one: _Wanted) -> Path:
        """The checked copy. A wrong one is fetched once more, from its first byte."""
        part, copy = _part(self.place, one), self.place / one.source.name
        with disk_errors(self.place):
            copy.unlink(missing_ok=True)  # not what it was when it was checked
            for _ in range(2):
                self._fetch(one, part)
                if (wrong := _what_is_wrong(part, one)) is None:
                    sync(part)
                    os.replace(part, copy)
                    return copy
                part.unlink()
        raise DataError(
            f"shard {one.source} was copied to {self.place} twice and is not what was indexed: "
            f"{wrong}. Bring the old one back, or index the new ones with `deepclust index`."
        )

    def _fetch(self, one: _Wanted, part: Path) -> None:
        """Fetch what the partial copy lacks."""
        if part.exists() and part.stat().st_size > one.size:
            part.unlink()
        with (
            open(part, "ab", buffering=0) as file,
            contextlib.closing(_pieces(one, file.tell(), self._stopped)) as pieces,
        ):
            for piece in pieces:
                if self._stopped():
                    raise Interrupted
                file.write(piece)
                with self._counting:
                    self.copied += len(piece)

    def _stopped(self) -> bool:
        return self._left.is_set() or self._asked()

    def _tell(self, total: int, final: bool) -> None:
        now = time.monotonic()
        if not final and now - self._told < TELL_S:
            return
        self._told = now
        logging.getLogger("deepclust").info(
            "copied %.2f of %.2f GB to %s, %.0f MB/s",
            self.copied / 1e9, total / 1e9, self.place, self.copied / 1e6 / (now - self._began),
        )  # fmt: skip


def _pieces(one: _Wanted, start: int, stopped: Callable[[], bool]) -> Generator[bytes, None, None]:
    if isinstance(one.source, Url):
        yield from remote.stream(one.source, start, one.size, stopped)
    else:
        yield from _local_pieces(one, start)


def _local_pieces(one: _Wanted, start: int) -> Iterator[bytes]:
    with contextlib.closing(ShardFiles([one.source])) as files:
        for at in range(start, one.size, remote.CHUNK):
            yield files.read(0, at, min(remote.CHUNK, one.size - at))


def _what_is_wrong(part: Path, one: _Wanted) -> str | None:
    """Compare a whole copy with the index."""
    if (size := part.stat().st_size) != one.size:
        return f"it has {size} bytes, not {one.size}"
    try:
        digest = scan(part).digest
    except DataError as error:
        return str(error)
    return None if digest == one.digest else "it holds other members"
