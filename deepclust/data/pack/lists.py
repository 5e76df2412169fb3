"""Lists of images: text files of "PATH LABEL" lines (.txt, .lst), and tables (.csv, .tsv).

A path is relative to the list. In a line, the label is what follows the last space or tab. A line
that is a path as a whole, or ends as one, has no label. Lines of MXNet are read too: NUMBER, LABEL
and PATH with tabs between them.
A table has a column of paths, called as in `PATHS`, and perhaps one of labels, as in `LABELS`.
Labels that are all integers are the class ids. Others are names, numbered in alphabetical order.
Where one is of several classes (cat|dog, or 3|7), all are names.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepclust.data.label_sets import SEPARATOR, is_set, join_names, names_in
from deepclust.data.pack.classes import Labels, number, read_names
from deepclust.data.pack.tally import Tally, shown
from deepclust.data.pack.walk import CONVERTED, COPIED
from deepclust.errors import DataError

TEXTS, TABLES = (".txt", ".lst"), (".csv", ".tsv")
PATHS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "img_path",
    "image",
    "img",
)
LABELS = (
    "label",
    "class",
    "class_name",
    "class_id",
    "cls",
    "category",
    "target",
    "label_name",
    "labels",
)
_INTEGER = re.compile(r"-?\d+(\.0*)?", re.ASCII)  # pandas writes 3.0 where a label is missing
_MISSING = ("nan", "none", "null", "n/a", "na", "<na>")
_NO_LABEL = "with a label that is not a class id: packed without one"
_LARGEST_LABEL = int(np.iinfo(np.int32).max)


class Row(NamedTuple):
    """An image and the word of its label; an empty one means none."""

    file: str
    label: str


def read_list(path: Path) -> list[Row]:
    """Read a list or a table, or raise DataError."""
    try:
        # Names that are not UTF-8 stay what they are.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot read {shown(str(path))}: {error}.") from error
    if path.suffix.lower() in TABLES:
        rows = list(_table(path, text))
    else:
        rows = [_row(path.parent, line) for line in text.split("\n") if line.strip()]
    if not rows:
        raise DataError(f"{path} lists no images. Write one a line: PATH, or PATH and LABEL.")
    return rows


def _row(folder: Path, line: str) -> Row:
    line = line.strip()
    parts = line.split("\t")
    if len(parts) >= 3 and parts[0].strip().isdigit() and not (folder / parts[0]).exists():
        return Row(parts[-1].strip(), parts[1].strip())
    file, _, label = line.rpartition("\t") if "\t" in line else line.rpartition(" ")
    is_word = os.path.splitext(label)[1].lower() not in COPIED | CONVERTED
    if not file or not is_word or _exists(folder / line):
        return Row(line, "")
    return Row(file.strip(), label.strip())


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False


def _table(path: Path, text: str) -> Iterator[Row]:
    header = text.partition("\n")[0]
    delimiter = max("\t;,", key=header.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = list(reader.fieldnames or [])
        at = column_of(path, columns, PATHS)
        if at is None:
            raise DataError(
                f"{path} has no column of paths: {', '.join(map(shown, columns[:10]))}. "
                f"Call it {' or '.join(PATHS[:4])}, and that of labels {LABELS[0]}."
            )
        label = column_of(path, columns, LABELS)
        for row in reader:
            if row[at]:
                yield Row(row[at].strip(), (row[label] or "").strip() if label else "")
    except csv.Error as error:
        raise DataError(f"{path} is not a table: {error}, near line {reader.line_num}.") from error


def column_of(path: Path, columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column of a table that has the first of these names, in any case.

    Raises `DataError` where two columns have it.
    """
    for name in names:
        same = [column for column in columns if column.strip().lower() == name]
        if len(same) > 1:
            raise DataError(f"{path} has {len(same)} columns {name!r}: keep the right one.")
        if same:
            return same[0]
    return None


def labels_of(words: Sequence[str], files: Sequence[str], names: str, tally: Tally) -> Labels:
    """Number the words of labels; `names` is a file of class names, or empty.

    Integers are class ids. One that is too large, or negative other than -1, counts as none, and is
    counted. A word that the file of class names lacks is a DataError.
    """
    known = read_names(Path(names)) if names else None
    words = _without_missing(words, files, tally)
    if any(map(is_set, words)):
        return number([_set_of(word, known, names) for word in words])
    integers = [word for word in words if _INTEGER.fullmatch(word)]
    if len(integers) == len(words) - words.count(""):
        ids = [_id(word, file, tally) for word, file in zip(words, files, strict=True)]
        if known is not None and max(ids, default=-1) >= len(known):
            raise DataError(f"{names} names {len(known)} classes, but labels reach {max(ids)}.")
        return Labels(np.array(ids, np.int32), known)
    if integers:
        word = next(word for word in words if word and not _INTEGER.fullmatch(word))
        raise DataError(
            f"some labels are integers ({shown(integers[0])}), and some are not ({shown(word)}). "
            "Correct them, or give --classes none."
        )
    return number(words) if known is None else _numbered(words, known, names)


def _without_missing(words: Sequence[str], files: Sequence[str], tally: Tally) -> list[str]:
    """Take "nan" and the like among integers for no label, and count them."""
    if not any(map(_INTEGER.fullmatch, words)):
        return list(words)
    kept = []
    for word, file in zip(words, files, strict=True):
        if word.lower() in _MISSING:
            tally.add(_NO_LABEL, f"{file}: {word}")
        kept.append("" if word.lower() in _MISSING else word)
    return kept


def _set_of(word: str, known: list[str] | None, names: str) -> str:
    """Return the text of a label among which some are of several classes.

    With a file of class names its numbers are those of lines, counted from 0.
    """
    own = names_in(word)
    if known is not None:
        own = [_known(one, known, names) for one in own]
    return join_names(own) if own or SEPARATOR in word else ""


def _known(word: str, known: list[str], names: str) -> str:
    if word in known:
        return word
    if _INTEGER.fullmatch(word) and 0 <= int(float(word)) < len(known):
        return known[int(float(word))]
    raise DataError(f"{names} lacks the class {shown(word)!r}, which is a label. Add it.")


def _numbered(words: Sequence[str], known: list[str], names: str) -> Labels:
    numbers = {name: i for i, name in enumerate(known)} | {"": -1}
    lacking = next((word for word in words if word not in numbers), None)
    if lacking is not None:
        raise DataError(f"{names} lacks the class {shown(lacking)!r}, which is a label. Add it.")
    return Labels(np.array([numbers[word] for word in words], np.int32), known)


def _id(word: str, file: str, tally: Tally) -> int:
    digits = word.partition(".")[0]
    # more than ten digits are too many, and int() refuses thousands of them
    value = int(digits) if digits and len(digits) <= 11 else -2 if digits else -1
    if -1 <= value <= _LARGEST_LABEL:
        return value
    tally.add(_NO_LABEL, f"{file}: {word[:20]}")
    return -1


def relative(file: str) -> str:
    """Return what keys are made of: the path without what leads out of a folder."""
    parts = os.path.normpath(file).split(os.sep)
    return "/".join(part for part in parts if part not in ("", ".", ".."))
