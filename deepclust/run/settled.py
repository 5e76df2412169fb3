"""Which attempt has settled the rounds of a run: the sign for a cluster worker to begin.

At the start of an attempt the first rank compares rounds with their hashes. It sets a damaged one
aside, and drops a final one that nothing ends with any more. A cluster worker that looked before
would cluster what is about to go. It would fail, or publish it as the round that follows.
"""

from __future__ import annotations

from deepclust.errors import DataError
from deepclust.files import read_record, write_json
from deepclust.run.directory import Run

FILE = "settled.json"


def settle(run: Run) -> None:
    """Say that the rounds that are there now are those of this attempt."""
    run.fence()
    write_json(run.path / FILE, {"attempt": run.attempt})


def is_settled(run: Run) -> bool:
    """Return whether the first rank of this attempt has settled the rounds.

    A damaged file says nothing: the first rank is about to write another one.
    """
    try:
        return int(read_record(run.path / FILE, {"attempt": int})["attempt"]) == run.attempt
    except DataError:
        return False
