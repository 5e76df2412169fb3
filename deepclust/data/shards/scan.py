"""The samples of a shard: its members grouped by WebDataset's rule, with labels and offsets.

The key is everything up to the first dot of the base name, folders included. The rest is the
extension. Consecutive members with one key are one sample, as in `base_plus_ext` and
`group_by_keys` of webdataset.tariterators (1.0.2). Three things differ, so that no sample is lost
or merged without an error:

- a key that comes back after other keys is an error
- two samples with one key are an error
- hidden files (the base name begins with a dot) are left out, in folders too

Whatever is left out is counted by its reason (`left_out.py`). No member is unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, UInt32, UInt64

from deepclust.data.shards.fields import (
    AUTO,
    DEFAULT,
    NONE,
    Fields,
    Sample,
    find_image,
    image_fields,
    label_name,
    label_number,
)
from deepclust.data.shards.file_lock import TELL_S
from deepclust.data.shards.left_out import Tally, shown
from deepclust.data.shards.remote import never
from deepclust.data.shards.tar import Left, Shard, TarEntry, entries, open_shard
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError

_KEY = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_THREADS = 8
_WORTH_THREADS = 1 << 30  # bytes of local shards; fewer are read sooner by one thread


@dataclass(frozen=True)
class Scan:
    """The content of one shard: row i is its i-th sample, and label -1 is "no label".

    `classes` are the names that the labels number, or None if the labels are numbers of their own.
    `pairs` is the key and the fields of a sample whose images all have further dots in their names.
    `common` is the one such field, if every sample has just that.
    """

    name: str
    size: int
    digest: str
    keys: pa.Array
    offsets: UInt64[np.ndarray, " n"]
    sizes: UInt32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    excluded: dict[int, str]
    classes: list[str] | None = None
    labels_digest: str = ""
    left: Tally = field(default_factory=Tally)
    unlabelled: Tally = field(default_factory=Tally)
    pairs: tuple[str, list[str]] | None = None
    common: str | None = None


def scan(path: Source, stopped: Callable[[], bool] = never, fields: Fields = DEFAULT) -> Scan:
    """Read one shard's headers and labels, and of a local shard none of its images.

    `fields` says what is the image and what the label. A sample without an image, or with an image
    of 0 bytes, keeps its place and is in `excluded` with the reason. `digest` is the blake2b of
    every member's name, offset and size, `labels_digest` that of the labels.

    Raises DataError that names shard, key and offset for everything that `tar.entries` refuses.
    The same for a shard without samples, and for a repeated key.
    """
    with open_shard(path, stopped) as shard:
        rows = _Rows(shard, fields)
        digest = hashlib.blake2b(digest_size=16)
        # A label is read as soon as its sample is complete: from a URL nothing is read twice.
        for sample in _samples(shard, digest.update, rows.left.add):
            rows.add(sample)
        if not rows.keys:
            what = f": {rows.left}" if rows.left.total else ""
            raise shard.wrong(f"holds no samples{what}", "Delete it, or write it again.")
        return rows.finish(path.name, digest.hexdigest())


class _Rows:
    """The samples of a shard that is being scanned."""

    def __init__(self, shard: Shard, fields: Fields) -> None:
        self.shard, self.fields = shard, fields
        self.keys: list[str] = []
        self.images: list[TarEntry] = []
        self.labels: list[int] = []
        self.classes: dict[str, int] = {}
        self.left, self.unlabelled = Tally(), Tally()
        self.pairs: tuple[str, list[str]] | None = None
        self.common: set[str | None] = set()

    def add(self, sample: Sample) -> None:
        """Add a sample's key, image and label."""
        image = find_image(sample, self.fields.image, self.left)
        if self.fields.image == AUTO and image.size == 0:
            self._look_closer(sample)
        elif len(self.common) < 2:
            self.common.add(None)
        self.keys.append(_storable(sample.key))
        self.images.append(image)
        self.labels.append(self._label(sample))

    def _look_closer(self, sample: Sample) -> None:
        """Remember the fields of a sample that would be images if names had fewer dots."""
        dotted = image_fields(sample)
        if len(self.common) < 2:
            self.common.add(dotted[0] if len(dotted) == 1 and "." in dotted[0] else None)
        if len(dotted) > 1 and self.pairs is None and all("." in name for name in dotted):
            self.pairs = sample.key, dotted

    def _label(self, sample: Sample) -> int:
        labels = self.fields.labels
        if labels == NONE:
            return -1
        if not self.fields.names_classes:
            return label_number(self.shard, sample, self.unlabelled)
        name = label_name(self.shard, sample, labels, self.unlabelled)
        return -1 if name is None else self.classes.setdefault(name, len(self.classes))

    def finish(self, name: str, digest: str) -> Scan:
        labels, classes = np.array(self.labels, np.int32), list(self.classes)
        named = self.fields.names_classes
        texts = [classes[i] if i >= 0 else "" for i in labels] if named else labels.tolist()
        common = next(iter(self.common)) if len(self.common) == 1 else None
        return Scan(
            name=name,
            size=self.shard.size,
            digest=digest,
            keys=pa.array(self.keys, pa.string()),
            offsets=np.array([image.offset for image in self.images], np.uint64),
            sizes=np.array([image.size for image in self.images], np.uint32),
            labels=labels,
            excluded={i: shown(m.name) for i, m in enumerate(self.images) if m.size == 0},
            classes=classes if named else None,
            labels_digest=hashlib.blake2b(repr(texts).encode(), digest_size=16).hexdigest(),
            left=self.left,
            unlabelled=self.unlabelled,
            pairs=self.pairs,
            common=common,
        )


def scan_all(shards: Sequence[Source], fields: Fields = DEFAULT) -> Iterator[Scan]:
    """Scan the shards and yield the scans in order.

    Threads wait for the disk or network together, unless the shards are local and small.
    """
    is_remote, total = isinstance(shards[0], Url), sum(size_of(shard) for shard in shards)
    if not is_remote and total < _WORTH_THREADS:
        yield from (scan(shard, never, fields) for shard in shards)
        return
    stop = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            scans = pool.map(lambda shard: scan(shard, stop.is_set, fields), shards)
            yield from _log_progress(scans, total) if is_remote else scans
        finally:
            stop.set()


def named(scans: Iterable[Scan], names: Iterable[str]) -> Iterator[Scan]:
    """Yield scans under the names that an index gives to their shards."""
    return (replace(one, name=name) for one, name in zip(scans, names, strict=True))


def size_of(shard: Source) -> int:
    """Return the size of a shard in bytes; raise DataError if it is not there."""
    if isinstance(shard, Url):
        return shard.size
    try:
        return shard.stat().st_size
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror}.") from error


def _log_progress(scans: Iterator[Scan], total: int) -> Iterator[Scan]:
    """Pass the scans on, with a line in the log every 10 seconds."""
    began = logged = time.monotonic()
    done = 0
    for one in scans:
        done += one.size
        if (now := time.monotonic()) - logged > TELL_S:
            logged, rate = now, done / 1e6 / (now - began)
            logging.getLogger("deepclust").info(
                "indexed %.1f of %.1f GB, %.0f MB/s", done / 1e9, total / 1e9, rate
            )
        yield one


def _samples(shard: Shard, digest: Callable[[bytes], None], left: Left) -> Iterator[Sample]:
    """Group consecutive members by key, and tell `left` of those that have none."""
    done: dict[str, tuple[str, ...]] = {}
    current = Sample("", {})
    for member in entries(shard, left):
        digest(f"{member.name}\0{member.offset}\0{member.size}\n".encode(errors="surrogateescape"))
        split = _KEY.match(member.name)
        if split is None or _META.match(member.name):
            left(_no_sample(member.name), member.name)
            continue
        key, extension = split[1], split[2].lower()
        if key != current.key:
            if current.files:
                yield current
            done[current.key] = tuple(current.files)
            current = Sample(key, {})
        if extension in current.files or extension in done.get(key, ()):
            raise _twice(shard, member, key)
        if key in done:
            raise _interleaved(shard, member, key)
        current.files[extension] = member
    if current.files:
        yield current


def _no_sample(name: str) -> str:
    base = name.rpartition("/")[2]
    if _META.match(name):
        return "member of the archive itself (__NAME__)"
    return "hidden file" if base.startswith(".") else "file without an extension"


def _twice(shard: Shard, member: TarEntry, key: str) -> DataError:
    return shard.wrong(
        f"key {shown(key)!r} names two samples: {shown(member.name)!r} appears again at offset "
        f"{member.offset}",
        "Give every sample of a shard its own key, or pack the images with `deepclust pack`.",
    )


def _interleaved(shard: Shard, member: TarEntry, key: str) -> DataError:
    return shard.wrong(
        f"key {shown(key)!r} appears again at offset {member.offset} ({shown(member.name)!r}) "
        "after other keys, but the members of a sample must be next to each other",
        "Write the tar with `tar --sort=name`, or pack the images with `deepclust pack`.",
    )


def _storable(key: str) -> str:
    r"""Return the key as valid text: bytes that are not UTF-8 become \xNN."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
