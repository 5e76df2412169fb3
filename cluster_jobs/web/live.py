"""Files of a run that grow, as server-sent events: each line once, from where the client was.

The id of an event is the offset behind its line, so a browser that reconnects goes on there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from cluster_jobs.web.answers import clean
from deepclust.files import open_regular, reading
from deepclust.run.events import is_event

POLL_S = 1.0
PIECE = 2**18  # bytes that are read at a time
QUIET = 15  # polls after which a comment shows that the connection lives


def lines_from(file: Path, offset: int) -> tuple[list[tuple[int, str]], int]:
    """Return whole lines from an offset on, each with the offset behind it, and the new offset.

    A file that became shorter is read from its beginning.
    """
    if not os.path.lexists(file):
        return [], 0
    with reading(file), open_regular(file) as log:
        size = log.seek(0, os.SEEK_END)
        start = offset if 0 <= offset <= size else 0
        log.seek(start)
        data = log.read(PIECE)
    # a line may be longer than a piece
    whole = data if len(data) == PIECE and b"\n" not in data else data[: data.rfind(b"\n") + 1]
    lines, at = [], start
    for line in whole.splitlines(keepends=True):
        at += len(line)
        lines.append((at, line.decode(errors="replace").rstrip("\r\n")))
    return lines, at


def last_offset(file: Path, lines: int) -> int:
    """Return where the last so many lines of a file begin, of no more than PIECE bytes."""
    if not os.path.lexists(file):
        return 0
    with reading(file), open_regular(file) as log:
        size = log.seek(0, os.SEEK_END)
        start = max(0, size - PIECE)
        log.seek(start)
        data = log.read(PIECE)
    parts = data.splitlines(keepends=True)
    return start + len(data) - sum(map(len, parts[max(0, len(parts) - lines) :]))


async def stream(
    file: Path,
    offset: int,
    is_over: Callable[[], bool],
    shape: Callable[[str], str | None] = lambda line: line,
) -> AsyncIterator[str]:
    """Yield the lines of a file as events until the run is over, then the event `end`.

    `shape` returns what is sent of a line, or None for nothing.
    """
    quiet = 0
    while True:
        over, (lines, offset) = await asyncio.to_thread(_look, file, offset, is_over)
        if lines:
            shaped = [(at, shape(line)) for at, line in lines]
            yield "".join(f"id: {at}\n" + _data(line) for at, line in shaped if line is not None)
            quiet = 0
            continue
        if over:
            yield "event: end\ndata: \n\n"
            return
        quiet += 1
        if quiet % QUIET == 0:
            yield ": nothing new\n\n"
        await asyncio.sleep(POLL_S)


def _look(
    file: Path, offset: int, is_over: Callable[[], bool]
) -> tuple[bool, tuple[list[tuple[int, str]], int]]:
    """Return whether the run is over, and what is new: asked first, read after, so all is read."""
    over = is_over()
    return over, lines_from(file, offset)


def event_text(line: str) -> str | None:
    """Return a line of events.jsonl as JSON for a browser, or None for another line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and is_event(record)
    return json.dumps(clean(record)) if known else None


def _data(line: str) -> str:
    return "".join(f"data: {part}\n" for part in line.split("\r") or [""]) + "\n"
