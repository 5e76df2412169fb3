"""The shard that `pack` would write of some images: its size, digest and rows, not its bytes.

So images in a folder have the sample ids, labels and fingerprint of the shards that are made of
them. A run goes on from one to the other. `pack/write.py` has the writer, `shards/scan.py` the
reader.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from deepclust.data.shards.fields import NO_LABEL_MEMBER
from deepclust.data.shards.header import BLOCK
from deepclust.data.shards.left_out import Tally
from deepclust.data.shards.scan import Scan

_LONGEST_NAME = 100  # letters that fit into a header; a longer name has a second header
_RECORD = 20 * BLOCK  # what the size of a tar is a multiple of
_END = 2 * BLOCK
_EMPTY = "image of 0 bytes"


class Member(NamedTuple):
    """A sample of a shard: its key, extension, size of the image in bytes, and label (-1: none)."""

    key: str
    extension: str
    size: int
    label: int


class Layout:
    """A shard that grows by samples."""

    def __init__(self) -> None:
        """Begin with no sample."""
        self._samples: list[Member] = []
        self._end = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, sample: Member) -> None:
        """Append a sample: its label, if it has one, and its image."""
        self._samples.append(sample)
        if sample.label >= 0:
            self._append(f"{sample.key}.cls", len(str(sample.label)))
        self._append(f"{sample.key}.{sample.extension}", sample.size)

    def _append(self, name: str, size: int) -> None:
        offset = self._end + _header_bytes(name)
        self._digest.update(f"{name}\0{offset}\0{size}\n".encode())
        self._end = offset + -(-size // BLOCK) * BLOCK

    def scan(self, name: str) -> Scan:
        """Return what a scan of the shard would find, with offset 0 for every image."""
        samples = self._samples
        labels, unlabelled = [sample.label for sample in samples], Tally()
        for sample in samples:
            if sample.label < 0:
                unlabelled.add(NO_LABEL_MEMBER, sample.key)
        return Scan(
            name=name,
            size=-(-(self._end + _END) // _RECORD) * _RECORD,
            digest=self._digest.hexdigest(),
            keys=pa.array([sample.key for sample in samples], pa.string()),
            offsets=np.zeros(len(samples), np.uint64),
            sizes=np.array([sample.size for sample in samples], np.uint32),
            labels=np.array(labels, np.int32),
            excluded={i: _EMPTY for i, sample in enumerate(samples) if sample.size == 0},
            labels_digest=hashlib.blake2b(repr(labels).encode(), digest_size=16).hexdigest(),
            unlabelled=unlabelled,
        )


def _header_bytes(name: str) -> int:
    """Return the bytes before a member's data; `tarfile` has the rule for names that do not fit."""
    if name.isascii() and len(name) <= _LONGEST_NAME:
        return BLOCK
    return len(tarfile.TarInfo(name).tobuf(tarfile.PAX_FORMAT))
