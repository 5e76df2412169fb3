"""Which samples a shard holds: its members grouped by WebDataset's rule, with labels and offsets.

The key is everything up to the first dot of the base name (folders included), the rest is the
extension, and consecutive members with one key are one sample: `base_plus_ext` and `group_by_keys`
of webdataset.tariterators (1.0.2). Three things differ, so that no sample is lost or glued together
in silence: a key that comes back later is an error; two samples with one key are an error; hidden
files (the base name begins with a dot) are no samples, in folders too. No member is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, UInt32, UInt64

from deepclust.data.shards.remote import never
from deepclust.data.shards.tar import Member, Shard, members, opened
from deepclust.data.shards.url import Source
from deepclust.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")
LABEL_FIELDS = ("label", "cls", "class")

_KEY = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_LARGEST_IMAGE = int(np.iinfo(np.uint32).max)
_LARGEST_LABEL = int(np.iinfo(np.int32).max)
_LARGEST_TEXT = 1 << 20


@dataclass(frozen=True)
class Scan:
    """What one shard holds; row i is its i-th sample. Label -1 is "none"."""

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
    files: dict[str, Member]


def scan(path: Source, stopped: Callable[[], bool] = never) -> Scan:
    """Read one shard's headers and labels, none of its images (unless it lies behind a URL).

    A label is the integer in KEY.cls, else an integer field "label", "cls" or "class" (the first
    of them) of KEY.json; -1, or a JSON without such a field, is "no label". A sample without an
    image, or with an image of 0 bytes, keeps its place and stands in `excluded` with the reason.
    `digest` is the blake2b of every member's name, offset and size.

    Raises DataError, naming shard, key and offset: see `tar.members`; and for a shard without
    samples, a key that stands for two samples or comes back, and a label that is no integer.
    """
    with opened(path, stopped) as shard:
        digest = hashlib.blake2b(digest_size=16)
        rows = [  # a label is read when its sample is complete: from a URL nothing is read twice
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


def _samples(shard: Shard, digest: Callable[[bytes], None]) -> Iterator[_Sample]:
    """Group consecutive members by key."""
    done: dict[str, tuple[str, ...]] = {}
    current = _Sample("", {})
    for member in members(shard):
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


def _twice(shard: Shard, member: Member, key: str) -> DataError:
    return shard.wrong(
        f"key {key!r} stands for two samples: {member.name!r} comes again at offset "
        f"{member.offset}",
        "Give every sample of a shard its own key, or pack the images with `deepclust pack`.",
    )


def _interleaved(shard: Shard, member: Member, key: str) -> DataError:
    return shard.wrong(
        f"key {key!r} comes back at offset {member.offset} ({member.name!r}) after other keys, "
        "but the members of a sample must stand together",
        "Write the tar with `tar --sort=name`, or pack the images with `deepclust pack`.",
    )


def _image(sample: _Sample) -> Member:
    """Where the sample's image is; if it has none, the size is 0 and the name is the reason."""
    images = [sample.files[name] for name in IMAGE_EXTENSIONS if name in sample.files]
    if not images:
        return Member(f"no image member, only .{', .'.join(sample.files)}", 0, 0)
    if images[0].size == 0:
        return Member("image of 0 bytes", 0, 0)
    if images[0].size > _LARGEST_IMAGE:
        return Member(f"image of {images[0].size} bytes, more than {_LARGEST_IMAGE}", 0, 0)
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
                f"key {sample.key!r}: .{extension} holds {text[:60]!r}, which is no label",
                "A label is an integer from 0, or -1 for none. Correct it, or leave it out.",
            )
    return -1


def _json_label(text: bytes) -> int:
    fields = json.loads(text)
    values = [fields.get(name) for name in LABEL_FIELDS] if isinstance(fields, dict) else []
    integers = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return integers[0] if integers else -1


_LABEL_PARSERS: dict[str, Callable[[bytes], int]] = {"cls": int, "json": _json_label}


def _read_text(shard: Shard, member: Member) -> bytes:
    if member.size > _LARGEST_TEXT:
        raise shard.wrong(
            f"{member.name!r} has {member.size} bytes, too many for a label",
            "Keep other data under another extension.",
        )
    return shard.read(member.size, member.offset)


def _storable(key: str) -> str:
    r"""The key as valid text: bytes that are no UTF-8 become \xNN."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
