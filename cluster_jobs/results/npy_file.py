"""A .npy file as rows to cluster, and the names of its rows.

Rows stay on disk, memory-mapped read-only, because Linux refuses a copy-on-write map of a file
larger than the memory. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deepclust.errors import DataError

FLOATS = ("float16", "float32", "float64")
CAST = "numpy.save(path, array.astype('float32'))"


def open_rows(path: Path) -> np.ndarray:
    """Return the array [n, d] of a .npy file, memory-mapped.

    `DataError` names the fix.
    """
    try:
        _check_header(path, *_header(path))
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a .npy file of features [n, d]") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is cut short or damaged ({error}); write it again") from error


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype."""
    with open(path, "rb") as file:
        start = file.read(len(np.lib.format.MAGIC_PREFIX))
        if start != np.lib.format.MAGIC_PREFIX:
            raise DataError(
                f"{path} is not a .npy file (it begins with {start!r}). Write one array with "
                f"{CAST}; of an .npz, save the array that holds the features."
            )
        file.seek(0)
        version = np.lib.format.read_magic(file)
        # version 3 differs from 2 only in field names, which we refuse anyway
        read = np.lib.format.read_array_header_2_0
        if version == (1, 0):
            read = np.lib.format.read_array_header_1_0
        shape, _, dtype = read(file)
    return shape, dtype


def _check_header(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise DataError(
            f"{path} holds pickled Python objects, which are never loaded: they can run code. "
            f"Save numbers: {CAST}"
        )
    if dtype.name not in FLOATS or not dtype.isnative:
        raise DataError(
            f"{path} has dtype {dtype}; features are {', '.join(FLOATS)} in native byte order. "
            f"Convert them: {CAST}"
        )
    if len(shape) != 2 or 0 in shape:
        raise DataError(
            f"{path} has shape {shape}; features are [n, d], one row for each sample, with n "
            "and d at least 1. Reshape it before saving."
        )


def read_names(path: Path) -> Iterator[str]:
    """Yield the names of the rows: the first column of a .parquet file, or a text's lines."""
    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(path)
            for batch in table.iter_batches(columns=table.schema_arrow.names[:1]):
                yield from map(str, batch.column(0).to_pylist())
        else:
            with open(path, encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot read names from {path}: {error}. Give a text file with a name in each line, "
            "or a .parquet file whose first column holds them."
        ) from error


def check_names(path: Path, rows: int) -> None:
    """Raise `DataError` unless there is one name for every row."""
    count = sum(1 for _ in read_names(path))
    if count != rows:
        raise DataError(
            f"{path} has {count} names for {rows} rows of features; give one for each row, in order"
        )
