"""Commands, functions and ranks in forks of one warm process that has imported everything.

A new interpreter takes five to ten seconds here until it has imported torch, and a run on two ranks
starts four. A fork starts in a moment. It is a process of its own, with its arguments, environment,
descriptors and exit code (`deepclust/launch/warm.py`). Tests of how processes are started for real
are marked `new_interpreters`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

from deepclust.launch.warm import LATER, RANK, Fork, Warm

MODULES = (RANK, *LATER, "tests.forks", "tools.bench.forked")


def run_command(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """`deepclust` with these words, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as told, err.open("wb") as failed:
            code = start_command(words, told, failed, **variables).wait(600.0)
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def start_command(words: list[str], out: BinaryIO, err: BinaryIO, **variables: str) -> Fork:
    """`deepclust` with these words, in a session of its own."""
    given, files = [json.dumps(variables), *words], [out.fileno(), err.fileno()]
    return server().fork("tests.forks:be_command", given, files, session=True)


def be_command(words: list[str], files: list[int]) -> None:
    """Be the command, in the fork."""
    from tools.bench import forked

    variables, *rest = words
    os.environ.update(json.loads(variables))
    forked.command(rest)


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, at module level, in a process of its own; fails where it raises."""
    with tempfile.TemporaryDirectory() as folder:
        given, result, out = Path(folder, "given"), Path(folder, "result"), Path(folder, "out")
        given.write_bytes(pickle.dumps((function, args)))
        words = [str(given), str(result)]
        with out.open("wb") as told:
            files = [told.fileno(), told.fileno()]
            code = server().fork("tests.forks:be_function", words, files).wait(600.0)
        assert code == 0, f"exit code {code}\n{out.read_text()}"
        return pickle.loads(result.read_bytes())  # what we have just written


def be_function(words: list[str], files: list[int]) -> None:
    """Call the function, in the fork."""
    from tools.bench import forked

    forked.fork_ranks()
    function, args = pickle.loads(Path(words[0]).read_bytes())
    Path(words[1]).write_bytes(pickle.dumps(function(*args)))


class Shared:
    """A warm process for runs of this process that stays for the next ones."""

    def fork(self, *args: Any, **options: Any) -> Fork:
        """As `Warm.fork`."""
        return server().fork(*args, **options)

    def close(self) -> None:
        """Leave it: the supervisor has killed what it had started."""


def server() -> Warm:
    """The warm process of these tests, which ends with them: that with Triton's interpreter or not.

    Triton reads the variable when it is imported.
    """
    return _server(os.environ.get("TRITON_INTERPRET"))


@functools.cache
def _server(interpret: str | None) -> Warm:
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        warm = Warm(*MODULES, options=())
    atexit.register(warm.close)
    return warm
