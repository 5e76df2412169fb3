"""Atomic files and folders: write under a temporary name, sync, then rename.

A full disk becomes a `DiskError` that names the path, and the file that was there stays as it was.

One reader of Python files is here too: `import_named`, for the modules of users.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deepclust.errors import DiskError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

HASH_BLOCK = 2**24  # bytes; small enough for a sign of life every second on a slow disk
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a `DiskError` with the remedy for a full, read-only or forbidden disk."""
    try:
        yield
    except OSError as error:
        # NumPy reports a short write without an errno
        if error.errno in _FULL or str(error).endswith(" written"):
            remedy = "Free some space there and resume; finished work is kept."
        elif error.errno in _FORBIDDEN:
            remedy = "Choose a folder that you may write to."
        else:
            raise
        reason = error.strerror or "No space left on device"
        raise DiskError(f"cannot write {error.filename or path}: {reason}. {remedy}") from error


def temporary(path: Path) -> Path:
    """Return a unique name under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def atomic_file(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary path, then sync it, call `before` (the fence) and rename it."""
    path = Path(path)
    partial = temporary(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            before()
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSONL file in one write, and end a line that was cut short before."""
    with disk_errors(path), open(path, "a+b") as file:
        torn = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + json.dumps(record, ensure_ascii=False).encode() + b"\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, without a line that a kill or a full disk cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """Return the blake2b of a file, read in blocks.

    `alive` is called after each.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            alive()
    return digest.hexdigest()


def atomic_folder(path: Path, fill: Callable[[Path], None], before: Callable[[], None]) -> None:
    """Fill a temporary folder, sync it, call `before` (the fence), then rename it to `path`."""
    partial = temporary(path)
    with disk_errors(path):
        try:
            partial.mkdir(parents=True)
            fill(partial)
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            before()
            os.rename(partial, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file of contiguous copies of the tensors on the CPU.

    The bytes are written by Python, so a full disk raises an OSError, as everywhere else.
    `safetensors.torch.save_file` would raise a SafetensorError.
    """
    # Recipes are read without torch.
    import torch
    from safetensors.torch import save

    whole = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    path.write_bytes(save(whole, metadata))


def import_named(name: str) -> ModuleType:
    """Import the module of a dotted name.

    A recipe or a run directory may come from anybody, and some modules act when they are imported
    (`ensurepip.__main__` installs packages). So names of the standard library and names with a
    leading underscore are refused. A run's own folder is never on the path. Raises RecipeError.
    """
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or not all(part[:1].isalpha() for part in parts):
        raise RecipeError(f"{name!r} is not the name of a module that may be imported: use a.b.c")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"{name!r} cannot be imported ({error}); put its folder into PYTHONPATH"
        ) from error
