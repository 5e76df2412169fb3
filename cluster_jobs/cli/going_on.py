"""What a command says when Ctrl-C or TERM stops it: the command that goes on with its work.

TERM arrives as a `KeyboardInterrupt`, so that all clean up as they do after Ctrl-C. A run that has
begun collects both itself and stops at its next step (`launch/signals.py`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from deepclust.errors import RequeueWanted, argument

INTERRUPTED, TERMINATED = 130, 143  # exit codes, as a shell has them


class Terminated(KeyboardInterrupt):
    """The process was sent TERM."""


def on_term(_number: int, _frame: FrameType | None) -> None:
    """Raise `Terminated`: the handler of TERM."""
    raise Terminated


def stop_on_term() -> None:
    """Let TERM stop this process as Ctrl-C does, where this is the main thread."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, on_term)


@contextlib.contextmanager
def resumed_by(command: Callable[[], str]) -> Iterator[None]:
    """Note the command that goes on with the work of the block in what interrupts it."""
    try:
        yield
    except (KeyboardInterrupt, RequeueWanted) as stopped:
        stopped.add_note(command())
        raise


def resume_command(run_dir: Path) -> str:
    """Return the command that goes on with a run, or the present one where there is none yet."""
    from cluster_jobs.display import command_line
    from deepclust.run.directory import exists

    return command_line("resume", run_dir) if exists(run_dir) else typed_again()


def typed_again() -> str:
    """Return the present command, to be typed again; a secret in it is not shown."""
    from cluster_jobs.display import command_line

    words = sys.argv[1:]
    if any(argument(word) != word for word in words):
        return "the same command again"
    return command_line(*words)


def interruption(end: BaseException) -> KeyboardInterrupt | None:
    """Return the Ctrl-C or TERM that led to the exit of a verb, or None."""
    error: BaseException | None = end
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def advice(stopped: BaseException) -> str:
    """Return what comes after the message: how to go on, where that is known."""
    notes = getattr(stopped, "__notes__", [])
    return f"\nto go on:\n  {notes[0]}" if notes else ""
