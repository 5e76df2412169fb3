"""A chunk of raw rows on disk: one safetensors file that has its own hash, and the pivot beside it.

A chunk appears in one rename, so its hash cannot be in another file. It is in the metadata of the
safetensors header, and covers the rest of the header and all tensors. Chunks of older versions have
none and are taken as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32
from safetensors import safe_open
from torch import Tensor

from deepclust.errors import DataError
from deepclust.files import (
    HASH_BLOCK,
    atomic_file,
    file_hash,
    open_regular,
    reading,
    write_tensors,
    write_text,
)
from deepclust.run.signs import unwatched

HASH = "blake2b"  # the key in the metadata of the header
MOST_HEADER = 2**28  # bytes; the reasons of excluded samples are in it
_whole: set[tuple[Any, ...]] = set()  # files that this process has compared with their hash
REMEDY = "Resume the run: the part that is damaged is extracted again."


def write(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    before: Callable[[], None],
    alive: Callable[[], None] = unwatched,
) -> None:
    """Write a chunk and its hash atomically; `before` is the fence."""
    place_holder = secrets.token_hex(16)  # as long as the hash, and nowhere else in the header
    with atomic_file(path, before, alive) as partial:
        write_tensors(partial, tensors, {**metadata, HASH: place_holder}, alive)
        with open(partial, "r+b") as file:
            _, digest = _header_and_digest(file, alive)
            size = _header_size(file)
            place = file.read(size).index(place_holder.encode())
            file.seek(8 + place)
            file.write(digest.encode())


@contextlib.contextmanager
def opened(path: Path, alive: Callable[[], None] = unwatched) -> Iterator[Any]:
    """Open a chunk as safetensors once it is as it was written, or raise `DataError`."""
    check(path, alive)
    with contextlib.ExitStack() as stack:
        with reading(path, REMEDY):
            tensors = stack.enter_context(safe_open(path, "pt"))
        yield tensors


def has_rows(path: Path) -> bool:
    """Return whether a chunk has its rows; one that cannot be read counts as damaged, not so."""
    try:
        with reading(path, REMEDY), safe_open(path, "pt") as tensors:
            return "rows" in tensors.keys()  # noqa: SIM118 - not a mapping
    except DataError:
        return True


def check(path: Path, alive: Callable[[], None] = unwatched) -> None:
    """Raise `DataError` for a chunk that differs from its hash; it is read once per process."""
    with reading(path, REMEDY), open_regular(path) as file:
        seen = os.fstat(file.fileno())
        key = (path, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        if key in _whole:
            return
        header, digest = _header_and_digest(file, alive)
        if header.get("__metadata__", {}).get(HASH, digest) != digest:
            raise DataError(f"{path} has changed since it was written. {REMEDY}")
        _whole.add(key)


def find_damaged(raw_dir: Path, alive: Callable[[], None] = unwatched) -> list[Path]:
    """Return the files of an extraction that are not as they were written.

    With a damaged pivot that is all of them, because rows are kept as differences from it.
    """
    chunks = sorted(raw_dir.glob("unit-*.safetensors"))
    pivot = raw_dir / "pivot.npy"
    if os.path.lexists(pivot) and not _is_whole(lambda: read_pivot(raw_dir)):
        return [pivot, *chunks]
    if not os.path.lexists(pivot):
        return chunks
    return [chunk for chunk in chunks if not _is_whole(lambda one=chunk: check(one, alive))]  # type: ignore[misc]


def write_pivot(
    raw_dir: Path, pivot: Float32[np.ndarray, " D"], before: Callable[[], None]
) -> None:
    """Write the pivot and its hash; the hash is there before the pivot is."""
    data = io.BytesIO()
    np.save(data, pivot)
    digest = hashlib.blake2b(data.getvalue(), digest_size=16).hexdigest()
    write_text(raw_dir / "pivot.blake2b", digest)
    with atomic_file(raw_dir / "pivot.npy", before) as partial:
        partial.write_bytes(data.getvalue())


def read_pivot(raw_dir: Path) -> Float32[np.ndarray, " D"]:
    """Return the pivot, or raise `DataError` when it is not as it was written."""
    file, digest = raw_dir / "pivot.npy", raw_dir / "pivot.blake2b"
    with reading(file, REMEDY):
        if digest.exists() and digest.read_text() != file_hash(file):
            raise DataError(f"{file} has changed since it was written. {REMEDY}")
        pivot: Float32[np.ndarray, " D"] = np.load(file, allow_pickle=False)
        return pivot


def _is_whole(look: Callable[[], object]) -> bool:
    try:
        look()
    except DataError:
        return False
    return True


def _header_size(file: BinaryIO) -> int:
    file.seek(0)
    return int.from_bytes(file.read(8), "little")


def _header_and_digest(file: BinaryIO, alive: Callable[[], None]) -> tuple[dict[str, Any], str]:
    """Return the header, and the blake2b of the header without its hash and of all tensors."""
    size = _header_size(file)
    if not 0 < size <= MOST_HEADER:
        raise ValueError(f"its header has {size} bytes")
    header: dict[str, Any] = json.loads(file.read(size))
    facts = {key: value for key, value in header.get("__metadata__", {}).items() if key != HASH}
    text = json.dumps({**header, "__metadata__": facts}, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    while block := file.read(HASH_BLOCK):
        digest.update(block)
        alive()
    return header, digest.hexdigest()
