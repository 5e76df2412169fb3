"""Files: written atomically, appended without following links, read with errors that name them.

A file is written under a temporary name, synced, then renamed. Whatever the system says against it
becomes a `DiskError` with the path, and the file that was there stays as it was. What cannot be
read, or is damaged, becomes a `DataError` with the path. A run may come from anybody.

One reader of Python files is here too: `import_named`, for the modules of users.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import itertools
import json
import math
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from deepclust.errors import DataError, DeepclustError, DiskError, MissingError, RecipeError, redact

if TYPE_CHECKING:
    from torch import Tensor

# Linux's sync_file_range: a C library elsewhere may lack it
_write_out = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None
_AND_WAIT = 1 | 2 | 4  # wait for what is being written, begin to write the rest, wait for that
SYNC_PIECE = 2**26  # bytes; small enough for a sign of life each minute at 1 MB/s
HASH_BLOCK = 2**24  # bytes; small enough for a sign of life every second on a slow disk
MOST_JSON = 2**30  # bytes of a JSON or JSONL file; more is not one of ours
LARGEST = 2**63  # of a whole number: one that is larger cannot be computed with
_FREE = (
    "Free some space there and resume; finished work is kept. `deepclust resume RUN "
    "keep.checkpoints=1` drops older checkpoints first."
)
_MAY = "Choose a folder that you may write to."
_FAILING = "Look at the storage, then resume."
REMEDIES = {  # of what the system says against a file
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FREE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR), _MAY),
    errno.EEXIST: "Something else stands there. Choose another name.",
    errno.ENOENT: "A folder or the target of a link is missing. Choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "It is a link, which is not followed here. Remove the link.",
    **dict.fromkeys((errno.EIO, errno.ESTALE), _FAILING),
}
# these say nothing of another thing than a file, even where no file is named with them
_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_OF_READING = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO, errno.ESTALE)  # as well


def path_of(value: object, what: str) -> Path:
    """Return a path that a caller of ours gave, or raise a `RecipeError` that names the argument.

    An empty text is refused: it would be the folder that the process happens to be in.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise RecipeError(
            f"{what}={redact(repr(value)[:200])} is not a path: give the name of a file as text"
        )
    return Path(path)


def check_utf8(path: Path, what: str) -> None:
    """Raise `RecipeError` for a path that safetensors and pyarrow cannot open."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise RecipeError(
            f"{ascii(str(path.absolute()))[1:-1]} is not UTF-8, so {what} cannot be there. Rename "
            "that folder. If its name looks right in your shell, set PYTHONUTF8=1."
        ) from None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a `DiskError` with path and remedy for what the system says against a file."""
    try:
        yield
    except DeepclustError:
        raise
    except OSError as error:
        # NumPy reports a short write without an errno
        short = error.errno is None and str(error).endswith(" written")
        number = errno.ENOSPC if short else error.errno
        if number is None or (error.filename is None and number not in _OF_FILES):
            raise
        if error.filename2 is not None and number in (errno.ENOTEMPTY, errno.EEXIST):
            raise  # of a rename: another process was first, which callers may want to know
        raise DiskError(_refused(error, number, path)) from error


def _refused(error: OSError, number: int, path: Path) -> str:
    """Return the message about a file that the system refuses."""
    what = "read or write" if number in _OF_READING else "write"
    reason = (error.errno and error.strerror) or os.strerror(number)
    remedy = REMEDIES.get(number, _FAILING)
    return f"cannot {what} {error.filename or path}: {reason}. {remedy}"


@contextlib.contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Raise a `DataError` with the path for a file that is missing, damaged or something else.

    Libraries raise what they like for a damaged file, so everything they raise counts. The block
    holds nothing but the reading.
    """
    try:
        yield
    except DeepclustError:
        raise
    except FileNotFoundError as error:
        raise MissingError(f"{path} is missing. {remedy}".rstrip()) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot read {path}: {reason}. {remedy}".rstrip()) from error
    except Exception as error:
        what = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{path} is damaged, or not what its name says: {type(error).__name__} {what}. "
            f"{remedy}".rstrip()
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, and refuse a pipe or device, which could block for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(handle, "rb")


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """Return the bytes of a regular file of at most that size, or raise a `DataError`."""
    with reading(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DataError(f"{path} has {size:,} bytes, more than {most:,}: it is not one of ours")
        return file.read()


def open_append(path: Path) -> BinaryIO:
    """Open a regular file at its end, for reading too, and create it if it is not there.

    A link is refused. Others may know the name and write to the folder, and a line of ours would
    land in a file of their choice. Raises OSError (see `disk_errors`).
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EPERM, "it is not a regular file", str(path))
    return open(handle, "a+b")


def create_empty(path: Path) -> None:
    """Create an empty file, or leave the one that is there as it is; refuse a link."""
    with disk_errors(path):
        open_append(path).close()


def target_of(path: Path) -> Path:
    """Return the file that writing `path` would replace: the end of a link, else itself.

    Raises `DiskError` for a folder, a device, a pipe or a socket, which must not become a file.
    So it does for a link to nothing, and for links in a circle.
    """
    with disk_errors(path):
        if not path.is_symlink():
            _refuse_special(path, path)
            return path
        try:
            target = Path(os.path.realpath(path, strict=True))
        except FileNotFoundError:
            raise OSError(errno.ENOENT, "it is a link to nothing", str(path)) from None
        _refuse_special(target, path)
        return target


def _refuse_special(target: Path, path: Path) -> None:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise DiskError(
            f"cannot write {path}: it is a device, a pipe or a socket, which a file would replace. "
            "Choose a file."
        )


def temporary(path: Path) -> Path:
    """Return a unique name under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name[:60]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def atomic_file(
    path: Path,
    before: Callable[[], None] = lambda: None,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Yield a temporary path, then sync it, call `before` (the fence) and rename it.

    A link is replaced, not its target: see `target_of` for a file that the user names.
    """
    path = Path(path)
    partial = temporary(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial, alive)
            before()
            os.replace(partial, path)
            sync(path.parent)
        finally:
            # an error of removing what is left must not hide why it is left
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically; a name in it that is not UTF-8 has Python's escapes."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, keys in the order given."""
    with atomic_file(path) as partial:
        partial.write_bytes(_json_bytes(value, indent=1) + b"\n")


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Return a value as JSON in UTF-8, where a name that is not UTF-8 has JSON's own escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """Read a JSON document.

    Raises `MissingError` for a file that is not there, `DataError` for anything else wrong with it.
    """
    data = read_bytes(Path(path), most)
    with reading(path):
        return json.loads(data.decode("utf-8"))


def read_record(path: Path, fields: dict[str, Any], most: int = MOST_JSON) -> dict[str, Any]:
    """Read a JSON object that has at least these fields, each of its type (see `fits`).

    Raises `DataError` that names the file and the first field that is not as it should be.
    """
    record = read_json(path, most)
    if not isinstance(record, dict):
        raise DataError(f"{path} is damaged: it holds no record, but {type(record).__name__}")
    for name, kind in fields.items():
        if not fits(record.get(name), kind):
            raise DataError(f"{path} is damaged: its {name!r} is missing, or no such value")
    return record


def fits(value: Any, kind: Any) -> bool:
    """Return whether a JSON value is of a type or one of a tuple of types (None: null or missing).

    Numbers are of a size that can be computed with. True and False are no numbers.
    """
    fitting = type(value) in _types(kind)
    return fitting and (type(value) is not int or -LARGEST < value < LARGEST)


@cache  # there are few kinds, and a list of many runs asks a million times
def _types(kind: Any) -> frozenset[type]:
    """Return the types of a kind: JSON's values have exactly these, never one derived of them."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return frozenset(type(None) if one is None else one for one in kinds)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSONL file in one write, and end a line that was cut short before."""
    line = _json_bytes(record) + b"\n"
    with disk_errors(path), open_append(path) as file:
        torn = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, without lines that are none.

    A kill or a full disk cuts a line short. Raises `DataError` for a file that cannot be read.
    """
    try:
        data = read_bytes(Path(path))
    except MissingError:
        return []
    records = (record_of(line) for line in data.split(b"\n"))
    return [record for record in records if record is not None]


def record_of(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None for anything else: a kill cuts a line short."""
    if not line:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        # a text: of bytes, json looks for another encoding first
        record = json.loads(line.decode("utf-8", "surrogatepass"))
        return record if isinstance(record, dict) else None
    return None


def sync(path: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Force a file or folder to disk, a large file piece by piece.

    `alive` is called after each piece. A single call of an hour, on a slow disk, would look
    like a hang.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        facts = os.fstat(handle)
        if stat.S_ISREG(facts.st_mode) and facts.st_size > SYNC_PIECE and _write_out is not None:
            for start in range(0, facts.st_size, SYNC_PIECE):
                _write_out(handle, ctypes.c_int64(start), ctypes.c_int64(SYNC_PIECE), _AND_WAIT)
                alive()
        os.fsync(handle)  # which also reports what could not be written, and the file's length
    finally:
        os.close(handle)


def file_hash(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """Return the blake2b of a file, read in blocks.

    `alive` is called after each.
    """
    return range_hash(path, 0, None, alive)


def range_hash(
    path: Path, start: int, stop: int | None, alive: Callable[[], None] = lambda: None
) -> str:
    """Return the blake2b of the bytes [start, stop) of a file; without `stop` to its end."""
    digest = hashlib.blake2b(digest_size=16)
    with reading(path), open_regular(path) as file:
        file.seek(start)
        left = stop - start if stop is not None else math.inf
        while left and (block := file.read(int(min(left, HASH_BLOCK)))):
            digest.update(block)
            left -= len(block)
            alive()
    return digest.hexdigest()


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder to WHY-NAME, or WHY-NAME-2 and so on, and return its new path."""
    plain = folder.with_name(f"{why}-{folder.name}")
    names = itertools.chain(
        [plain], (plain.with_name(f"{plain.name}-{i}") for i in itertools.count(2))
    )
    target = next(name for name in names if not os.path.lexists(name))
    with disk_errors(folder):
        folder.rename(target)
    return target


def atomic_folder(
    path: Path,
    fill: Callable[[Path], None],
    before: Callable[[], None],
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Fill a temporary folder, sync it, call `before` (the fence), then rename it to `path`."""
    partial = temporary(path)
    with disk_errors(path):
        try:
            partial.mkdir(parents=True)
            fill(partial)
            for file in partial.iterdir():
                sync(file, alive)
            sync(partial)
            before()
            os.rename(partial, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file of the tensors, which may be on any device and share memory.

    The bytes are those of `safetensors.torch.save`, which would hold two copies of all tensors.
    Each piece of them is written by itself. `alive` is called for it, and a full disk raises an
    OSError.
    """
    header, order = _tensor_header(tensors, metadata)
    with path.open("wb") as file:
        file.write(header)
        alive()
        for key in order:
            data = _tensor_bytes(tensors[key])
            for start in range(0, len(data), SYNC_PIECE):
                file.write(data[start : start + SYNC_PIECE])
                alive()


def _tensor_header(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> tuple[bytes, list[str]]:
    """Return the first bytes of a safetensors file, and the tensors in its order.

    The order and the names of types are the library's, from tensors without numbers.
    """
    import torch  # recipes are read without torch
    from safetensors.torch import save

    empty = save({key: torch.empty(0, dtype=one.dtype) for key, one in tensors.items()})
    entries: dict[str, Any] = json.loads(empty[8:])
    end = 0
    for key, entry in entries.items():
        begin, end = end, end + tensors[key].numel() * tensors[key].element_size()
        entry |= {"shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    first = {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps({**first, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, list(entries)


def _tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor as they lie in a file; no copy where they lie so."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def remove_folder(folder: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Delete a folder of files, one by one; `alive` is called after each.

    What cannot be deleted stays, and nothing is raised.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                alive()
    shutil.rmtree(folder, ignore_errors=True)


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
