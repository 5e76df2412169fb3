"""What a list of many runs shows of each, without reading its files whole.

A folder has a thousand runs, and a run has millions of lines of metrics. So the newest lines are
read from the end of the file, and the epochs from the section `train` of the recipe.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from deepclust.errors import DataError
from deepclust.files import open_regular, read_bytes, reading, record_of
from deepclust.recipe.plain import MOST_TEXT
from deepclust.recipe.sealed import MARK
from deepclust.run.events import is_metric

PIECE = 2**15  # bytes at the end of a file that are read first; four times as many if too few
SPARE = 4  # records that are read for each that is asked for: attempts may overlap
SECTION = re.compile(r"^train:\n((?:  .*\n)+)", re.MULTILINE)
EPOCHS = re.compile(r"^  epochs: (\d{1,9})\n", re.MULTILINE)
Record = dict[str, Any]


def epochs_in(file: Path) -> int | None:
    """Return train.epochs of a recipe as a run writes it, or None where the YAML must be read.

    A run's own file has a seal and blocks of two spaces; what a person has written may differ.
    """
    try:
        text = read_bytes(file, MOST_TEXT).decode("utf-8", "replace")
    except DataError:  # the reader of the YAML says what is wrong with it
        return None
    if not text.startswith(MARK):
        return None
    sections = SECTION.findall(text)
    found = EPOCHS.findall(sections[0]) if len(sections) == 1 else []
    return int(found[0]) if len(found) == 1 else None


def newest_metrics(file: Path, kind: str, count: int) -> list[Record]:
    """Return the last records of a kind by step, at most `count`, in order.

    Of two with one step the later attempt's counts. A file that is not there has none.
    """
    if not os.path.lexists(file):
        return []
    records: list[Record] = []
    with reading(file), open_regular(file) as log:
        size, piece = log.seek(0, os.SEEK_END), PIECE
        while True:
            start = max(0, size - piece)
            log.seek(start)
            lines = log.read(size - start).split(b"\n")[1 if start else 0 :]
            records = _last(lines, kind, SPARE * count)
            if start == 0 or len(records) >= SPARE * count:
                break
            piece *= 4
    records.sort(key=attempt_of)
    latest = {int(record["step"]): record for record in records}
    return [latest[step] for step in sorted(latest)[-count:]]


def attempt_of(record: Record) -> int:
    """Return the attempt that has written a record of metrics."""
    return int(record.get("attempt", record.get("incarnation", 0)) or 0)  # the older name


def _last(lines: list[bytes], kind: str, most: int) -> list[Record]:
    """Return the last records of a kind in some lines, at most so many, oldest first."""
    found: list[Record] = []
    for line in reversed(lines):
        if len(found) == most:
            break
        record = record_of(line)
        if record is not None and is_metric(record) and record["kind"] == kind:
            found.append(record)
    return found[::-1]
