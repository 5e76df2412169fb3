"""The samples of a shard: its members grouped by WebDataset's rule, with labels and offsets.

The key is everything up to the first dot of the base name, folders included. The rest is the
extension. Consecutive members with one key are one sample, as in `base_plus_ext` and
`group_by_keys` of webdataset.tariterators (1.0.2). Three things differ, so that no sample is lost
or merged without an error:

- a key that comes back after other keys is an error
- two samples with one key are an error
- hidden files (the base name begins with a dot) are left out, in folders too

No member is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, UInt32, UInt64

from deepclust.data.shards.file_lock import TELL_S
from deepclust.data.shards.remote import never
from deepclust.data.shards.tar import Shard, TarEntry, entries, open_shard
from deepclust.data.shards.url import Source, Url
from deepclust.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")
LABEL_FIELDS = ("label", "cls", "class")

_KEY = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_LARGEST_IMAGE = int(np.iinfo(np.uint32).max)
_LARGEST_LABEL = int(np.iinfo(np.int32).max)
_LARGEST_TEXT = 1 << 20
_THREADS = 8
_WORTH_THREADS = 1 << 30  # bytes of local shards; fewer are read sooner by one thread


@dataclass(frozen=True)
class Scan:
    """The content of one shard: row i is its i-th sample, and label -1 is "no label"."""

    name: str
    size: int
    digest: str
    keys: pa.Array
    offsets: UInt64[np.ndarray, " n"]
    sizes: UInt32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    excluded: dict[int, str]


class _Sample(NamedTuple):
    key: str
    files: dict[str, TarEntry]


def scan(path: Source, stopped: Callable[[], bool] = never) -> Scan:
    """Read one shard's headers and labels, and of a local shard none of its images.

    A label is the integer in KEY.cls, else the first integer field "label", "cls" or "class" of
    KEY.json. -1, or a JSON without such a field, is "no label". A sample without an image, or with
    an image of 0 bytes, keeps its place and is in `excluded` with the reason. `digest` is the
    blake2b of every member's name, offset and size.

    Raises DataError that names shard, key and offset for everything that `tar.entries` refuses.
    The same for a shard without samples, a repeated key, and a label that is not an integer.
    """
    with open_shard(path, stopped) as shard:
        digest = hashlib.blake2b(digest_size=16)
        # A label is read as soon as its sample is complete: from a URL nothing is read twice.
        rows = [
            (_storable(sample.key), _image(sample), _label(shard, sample))
            for sample in _samples(shard, digest.update)
        ]
        if not rows:
            raise shard.wrong("holds no samples", "Delete it, or write it again.")
        keys, images, labels = zip(*rows, strict=True)
        return Scan(
            name=path.name,
            size=shard.size,
            digest=digest.hexdigest(),
            keys=pa.array(keys, pa.string()),
            offsets=np.array([image.offset for image in images], np.uint64),
            sizes=np.array([image.size for image in images], np.uint32),
            labels=np.array(labels, np.int32),
            excluded={i: image.name for i, image in enumerate(images) if image.size == 0},
        )


def scan_all(shards: Sequence[Source]) -> Iterator[Scan]:
    """Scan the shards and yield the scans in order.

    Threads wait for the disk or network together, unless the shards are local and small.
    """
    is_remote, total = isinstance(shards[0], Url), sum(size_of(shard) for shard in shards)
    if not is_remote and total < _WORTH_THREADS:
        yield from map(scan, shards)
        return
    stop = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            scans = pool.map(lambda shard: scan(shard, stop.is_set), shards)
            yield from _log_progress(scans, total) if is_remote else scans
        finally:
            stop.set()


def size_of(shard: Source) -> int:
    """Return the size of a shard in bytes."""
    return shard.size if isinstance(shard, Url) else shard.stat().st_size


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


def _samples(shard: Shard, digest: Callable[[bytes], None]) -> Iterator[_Sample]:
    """Group consecutive members by key."""
    done: dict[str, tuple[str, ...]] = {}
    current = _Sample("", {})
    for member in entries(shard):
        digest(f"{member.name}\0{member.offset}\0{member.size}\n".encode(errors="surrogateescape"))
        split = _KEY.match(member.name)
        if split is None or _META.match(member.name):
            continue
        key, extension = split[1], split[2].lower()
        if key != current.key:
            if current.files:
                yield current
            done[current.key] = tuple(current.files)
            current = _Sample(key, {})
        if extension in current.files or extension in done.get(key, ()):
            raise _twice(shard, member, key)
        if key in done:
            raise _interleaved(shard, member, key)
        current.files[extension] = member
    if current.files:
        yield current


def _twice(shard: Shard, member: TarEntry, key: str) -> DataError:
    return shard.wrong(
        f"key {key!r} names two samples: {member.name!r} appears again at offset {member.offset}",
        "Give every sample of a shard its own key, or pack the images with `deepclust pack`.",
    )


def _interleaved(shard: Shard, member: TarEntry, key: str) -> DataError:
    return shard.wrong(
        f"key {key!r} appears again at offset {member.offset} ({member.name!r}) after other keys, "
        "but the members of a sample must be next to each other",
        "Write the tar with `tar --sort=name`, or pack the images with `deepclust pack`.",
    )


def _image(sample: _Sample) -> TarEntry:
    """Return the entry of the sample's image, or one of size 0 with the reason as its name."""
    images = [sample.files[name] for name in IMAGE_EXTENSIONS if name in sample.files]
    if not images:
        return TarEntry(f"no image member, only .{', .'.join(sample.files)}", 0, 0)
    if images[0].size == 0:
        return TarEntry("image of 0 bytes", 0, 0)
    if images[0].size > _LARGEST_IMAGE:
        return TarEntry(f"image of {images[0].size} bytes, more than {_LARGEST_IMAGE}", 0, 0)
    return images[0]


def _label(shard: Shard, sample: _Sample) -> int:
    for extension, parse in _LABEL_PARSERS.items():
        if extension in sample.files:
            text = _read_text(shard, sample.files[extension])
            with contextlib.suppress(ValueError, RecursionError):
                label = parse(text)
                if -1 <= label <= _LARGEST_LABEL:
                    return label
            raise shard.wrong(
                f"key {sample.key!r}: .{extension} holds {text[:60]!r}, which is not a label",
                "A label is an integer from 0, or -1 for none. Correct it, or leave it out.",
            )
    return -1


def _json_label(text: bytes) -> int:
    fields = json.loads(text)
    values = [fields.get(name) for name in LABEL_FIELDS] if isinstance(fields, dict) else []
    integers = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return integers[0] if integers else -1


_LABEL_PARSERS: dict[str, Callable[[bytes], int]] = {"cls": int, "json": _json_label}


def _read_text(shard: Shard, member: TarEntry) -> bytes:
    if member.size > _LARGEST_TEXT:
        raise shard.wrong(
            f"{member.name!r} has {member.size} bytes, too many for a label",
            "Keep other data under another extension.",
        )
    return shard.read(member.size, member.offset)


def _storable(key: str) -> str:
    r"""Return the key as valid text: bytes that are not UTF-8 become \xNN."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
