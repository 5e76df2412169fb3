"""Images in Parquet, as Hugging Face writes them, or a table of paths in Parquet.

The column of images is a struct {"bytes", "path"} or binary, and is copied to an unnamed file. That
of paths is text, called as in `lists.PATHS`. The names of classes are those that Hugging Face's
metadata have for the column of labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from deepclust.data.label_sets import join_names
from deepclust.data.pack.blobs import Blobs, Files, failed
from deepclust.data.pack.lists import LABELS, PATHS, column_of
from deepclust.data.pack.tally import Tally, shown
from deepclust.errors import DataError

_IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_ROWS = 256  # that are in memory at once


class Table(NamedTuple):
    """The rows: a name and a label's word for each image, and the bytes unless `blobs` is None."""

    files: list[str]
    words: list[str]
    class_names: list[str] | None
    blobs: Blobs | None


class _Columns(NamedTuple):
    image: str | None
    path: str | None
    label: str | None


def read_parquet(paths: Sequence[Path], tally: Tally, files: Files) -> Table:
    """Read the tables one after the other; the bytes are copied to an unnamed file."""
    columns = _columns(paths[0])
    table = Table([], [], _class_names(paths[0], columns.label), None)
    if columns.image is not None:
        table = table._replace(blobs=Blobs(files.scratch()))
    for path in paths:
        try:
            for number, row in enumerate(_rows(path, columns)):
                _take(table, row, columns, _default_name(path, paths, number), tally)
            if table.blobs is not None:
                table.blobs.file.flush()
        except Exception as error:  # of many types, where a file is damaged
            raise failed(path, error, files.folder) from error
    return table


def holds_images(path: Path) -> bool:
    """Return whether a table holds the bytes of images, not their paths."""
    return _columns(path).image is not None


def _default_name(path: Path, paths: Sequence[Path], number: int) -> str:
    return f"{number:09d}" if len(paths) == 1 else f"{path.stem}/{number:09d}"


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise failed(path, error, path.parent) from error


def _columns(path: Path) -> _Columns:
    schema = _schema(path)
    images = [field.name for field in schema if _holds_bytes(field.type)]
    image = column_of(path, images, _IMAGES) or (images[0] if len(images) == 1 else None)
    texts = [field.name for field in schema if _is_text(field.type)]
    at = None if image else column_of(path, texts, PATHS)
    if image is None and at is None:
        raise DataError(
            f"{path} has no column of images or paths: {', '.join(map(shown, schema.names[:10]))}. "
            f'Call it "image" (bytes, or a struct of bytes and path) or "path".'
        )
    # boxes name no class
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    lists = [field.name for field in schema if _is_list_of_labels(field.type)]
    label = column_of(path, plain, LABELS) or _only_class(schema, plain)
    label = label or column_of(path, lists, LABELS)
    return _Columns(image, at, label)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what Hugging Face's metadata say of the columns, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    known = features.items() if isinstance(features, dict) else ()
    return {name: feature for name, feature in known if isinstance(feature, dict)}


def _only_class(schema: pa.Schema, columns: Sequence[str]) -> str | None:
    """Return the column that the metadata call a class, if there is only one."""
    classes = [name for name, feature in _features(schema).items() if "names" in feature]
    return classes[0] if len(classes) == 1 and classes[0] in columns else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # pandas' categories
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list_of_labels(kind: pa.DataType) -> bool:
    """Return whether a column has lists of texts or of whole numbers: several classes an image."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return _is_text(kind.value_type) or bool(pa.types.is_integer(kind.value_type))


def _class_names(path: Path, label: str | None) -> list[str] | None:
    """Return the names that Hugging Face's metadata have for the labels, if there are any."""
    about = _features(_schema(path)).get(label or "", {})
    each = about.get("feature", about.get("_inner"))  # of lists
    names = (each if isinstance(each, dict) else about).get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list and names else None


def _rows(path: Path, columns: _Columns) -> Iterator[dict[str, Any]]:
    wanted = [column for column in columns if column is not None]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=wanted):
            yield from batch.to_pylist()


def _take(table: Table, row: dict[str, Any], columns: _Columns, default: str, tally: Tally) -> None:
    """Keep the image of a row, or count a row without one."""
    label = row[columns.label] if columns.label else None
    word = _word_of(label, table.class_names)
    if columns.path is not None:
        table.files.append(row[columns.path] or default)
    else:
        value = row[str(columns.image)]
        name = (value or {}).get("path") if not isinstance(value, bytes) else None
        data = value if isinstance(value, bytes) else (value or {}).get("bytes")
        if not data:
            tally.add("row without the bytes of an image", name or default)
            return
        assert table.blobs is not None
        table.blobs.put(data)
        table.files.append(name or default)
    table.words.append(word)


def _word_of(label: Any, names: list[str] | None) -> str:
    """Return a label as text: of a list the classes, by their names where these are known."""
    if not isinstance(label, list):
        return "" if label is None else str(label)
    known = dict(enumerate(names or []))
    return join_names(str(known.get(one, one)) for one in label if one is not None)
