"""kill -9 at chosen instants of the threads that commit checkpoints and chunks of an extraction.

An instant is just before or after a call in such a thread, so it is struck for certain, whatever
the main thread does then. `tools/bench/instants.py` goes through all of them.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepclust import pretrain
from deepclust.launch.start import resume

SETTINGS = ("train.batch=60", "train.checkpoint=7 steps", "keep.checkpoints=1")
WRITER, EXTRACT = "deepclust.run.checkpoint_writer", "deepclust.stages.extract"
DIRECTORY, CHUNK = "deepclust.run.directory", "deepclust.stages.raw_chunk"


@dataclass(frozen=True)
class Instant:
    """A call of `name` in a thread: the one of this number, before it begins or after its end."""

    thread: str  # how the thread's name begins
    module: str
    name: str
    number: int
    after: bool = False


INSTANTS = {  # the fourth checkpoint, and the second chunk of round 1, of three commits each
    "checkpoint: nothing is written": Instant("checkpoint", WRITER, "CheckpointWriter._write", 4),
    "checkpoint: some tensors are": Instant("checkpoint", WRITER, "write_tensors", 7, after=True),
    "checkpoint: all tensors are": Instant("checkpoint", WRITER, "write_json", 4),
    "checkpoint: before the rename": Instant("checkpoint", DIRECTORY, "Run.fence", 4),
    "checkpoint: renamed": Instant("checkpoint", WRITER, "prune", 4),
    "checkpoint: the old one is gone": Instant("checkpoint", WRITER, "prune", 4, after=True),
    "chunk: nothing is written": Instant("chunks", EXTRACT, "_commit_chunk", 6),
    "chunk: without its hash": Instant("chunks", CHUNK, "write_tensors", 6, after=True),
    "chunk: before the rename": Instant("chunks", DIRECTORY, "Run.fence", 6),
    "chunk: renamed": Instant("chunks", EXTRACT, "_commit_chunk", 6, after=True),
}


def leave_alone(recipe: Path, run: Path) -> None:
    """Run a recipe in this process."""
    pretrain(recipe, run)


def kill_and_resume(recipe: Path, run: Path, instant: Instant) -> int:
    """Kill a run of one rank at an instant, resume it in this process, and return its exit code.

    It is negative, the signal, where the run was killed.
    """
    code = _killed(recipe, run, instant)
    resume(run)
    return code


def _killed(recipe: Path, run: Path, instant: Instant) -> int:
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        strike(instant)
        pretrain(recipe, run)
        code = 0  # the instant never came
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def strike(instant: Instant) -> None:
    """Let this process be killed when the instant comes."""
    owner: Any = importlib.import_module(instant.module)
    *path, name = instant.name.split(".")
    for part in path:
        owner = getattr(owner, part)
    inner, calls = getattr(owner, name), 0

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        ours = threading.current_thread().name.startswith(instant.thread)
        calls += ours
        now = ours and calls == instant.number
        if now and not instant.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)
