"""Tables of results, written batch by batch as Parquet or CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from cluster_jobs.terminal import visible
from deepclust.errors import RecipeError
from deepclust.files import atomic_file, target_of

WRITERS = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")  # and the wide forms of Asian keyboards


def check_suffix(out: Path) -> None:
    """Raise `RecipeError` for a file that is named neither .parquet nor .csv."""
    if out.suffix not in WRITERS:
        raise RecipeError(f"cannot write {out}: name it {' or '.join('*' + s for s in WRITERS)}")


def write_table(out: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches to `out` atomically, in the format of its suffix."""
    check_suffix(out)
    with atomic_file(target_of(out)) as partial, WRITERS[out.suffix](partial, schema) as writer:
        for batch in batches:
            writer.write_batch(batch if out.suffix != ".csv" else safe_cells(batch))


def safe_cells(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch whose texts no spreadsheet runs and no terminal obeys.

    A text that begins with = + - @ has an apostrophe before it. Control characters are written as
    Python writes them. Keys and classes come with the shards, which may be anybody's.
    """
    columns = [
        pa.array([text and _safe(text) for text in column.to_pylist()], pa.string())
        if pa.types.is_string(column.type)
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _safe(text: str) -> str:
    text = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return f"'{text}" if FORMULA.match(text) else text
