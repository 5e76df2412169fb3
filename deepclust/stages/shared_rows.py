"""A file of rows that all ranks write together, each its own stretches, hashed while it does.

Rank 0 alone would have to read the whole file again for its hash. With 100 million rows that takes
longer than a hang may last. So every rank hashes what it writes, and forces it to disk from its own
machine. It leaves the hashes of its parts in a file beside the rows.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from deepclust.errors import DataError
from deepclust.files import range_hash, read_json, sync, write_json
from deepclust.run.directory import Parts, Run


@dataclass
class SharedRows:
    """An .npy file [n, d] that is being written, as one rank sees it."""

    path: Path
    run: Run
    rank: int
    start: int = 0  # where the rows begin, bytes
    width: int = 0  # of a row, bytes
    parts: Parts = field(default_factory=list)

    def create(self, n: int, dim: int, dtype: DTypeLike = np.float16) -> None:
        """Make the file, once for all ranks."""
        np.lib.format.open_memmap(self.path, "w+", np.dtype(dtype), (n, dim)).flush()

    def open(self) -> SharedRows:
        """Return the file, once it is there, ready to be written to."""
        rows = np.load(self.path, mmap_mode="r")
        self.start, self.width = int(rows.offset), int(rows.shape[1] * rows.itemsize)
        return self

    def stretch(self, first: int) -> Stretch:
        """Return what writes rows from row `first` on, block after block, as one part."""
        return Stretch(self, self.start + first * self.width)

    def finish(self) -> None:
        """Force what this rank has written to disk, and leave its hashes for rank 0."""
        sync(self.path, self.run.alive)
        write_json(self._notes(self.rank), self.parts)

    def all_parts(self, ranks: int) -> Parts:
        """Return the parts of the whole file, by rank 0, after every rank has finished."""
        own = [part for rank in range(ranks) for part in read_json(self._notes(rank))]
        head = (self.start, range_hash(self.path, 0, self.start))
        parts = sorted([head, *((int(end), str(digest)) for end, digest in own)])
        if parts[-1][0] != self.path.stat().st_size:
            raise DataError(f"{self.path} was not written to its end")
        return parts

    def _notes(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.parts-{rank}")


class Stretch:
    """Consecutive rows that are being written: one part of the file."""

    def __init__(self, rows: SharedRows, offset: int) -> None:
        self.rows, self.offset = rows, offset
        self.digest = hashlib.blake2b(digest_size=16)

    def add(self, block: np.ndarray) -> None:
        """Write the next rows."""
        data = block.tobytes()
        write_at(self.rows.path, self.offset, data)
        self.digest.update(data)
        self.offset += len(data)
        self.rows.run.alive()

    def end(self) -> None:
        """Note the hash of the part."""
        self.rows.parts.append((self.offset, self.digest.hexdigest()))


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write bytes at a place of a file that is there."""
    left = memoryview(data)
    handle = os.open(path, os.O_WRONLY)
    try:
        while left:  # a disk that is nearly full writes less than it is asked to
            written = os.pwrite(handle, left, offset)
            left, offset = left[written:], offset + written
    finally:
        os.close(handle)
