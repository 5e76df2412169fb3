"""Arguments that verbs share, and how a verb prints."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster_jobs.cli import complete
from cluster_jobs.terminal import duration, visible
from deepclust.files import path_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

STILL_S = 10.0  # between two lines of `begun`
BEAT = "what was begun"  # the name of a thread
WIDE = 200  # columns of a table where there is no terminal
_going_on: list[threading.Event] = []
RunDir = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="The run directory.", autocompletion=complete.runs),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="The path of a recipe, or the name of a shipped one.",
        autocompletion=complete.recipes,
    ),
]
RunOption = Annotated[
    Path,
    typer.Option(
        "--run",
        help="The run directory to create.",
        metavar="DIRECTORY",
        parser=lambda text: path_of(text, "--run"),  # an empty one would be the present folder
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="a.b=c",
        help="Keys of the recipe and their new values.",
        autocompletion=complete.keys,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The file to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def examples(*commands: str) -> str:
    """Return the text under a verb's help."""
    title = "Example:" if len(commands) == 1 else "Examples:"
    return "\n\n".join([title, *(f"deepclust {command}" for command in commands)])


def print_out(content: Table | Group | str) -> None:
    """Print a table or text on stdout, as wide as the terminal.

    What does not fit into a column is folded there, and nothing is cut off.
    """
    from rich.console import Console
    from rich.table import Table

    if isinstance(content, Table):
        for column in content.columns:
            column.overflow = "fold"
    Console(width=terminal_width()).print(content)


def terminal_width() -> int:
    """Return the columns of the terminal, or `WIDE` where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def log(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(visible(text) + "\n")


def begun(text: str) -> None:
    """Say what begins, before anything slow is imported, and then that it goes on, until `ended`.

    Descriptor 2 is another one while an image is decoded (`complaints.py`), so this has its own.
    """
    log(text)
    over = threading.Event()
    with contextlib.suppress(OSError):  # there may be no stderr
        words = (os.dup(2), visible(text).encode(errors="replace"), over)
        threading.Thread(target=_beat, args=words, daemon=True, name=BEAT).start()
        _going_on.append(over)


def ended() -> None:
    """Say no more of what was begun: the command has ended, well or not."""
    while _going_on:
        _going_on.pop().set()


def _beat(stderr: int, text: bytes, over: threading.Event) -> None:
    began = time.monotonic()
    with contextlib.suppress(OSError):
        while not over.wait(STILL_S):
            os.write(stderr, text + f": {duration(time.monotonic() - began)} so far\n".encode())
    os.close(stderr)
