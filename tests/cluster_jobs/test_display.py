"""What a run in the foreground shows where there is no terminal: plain lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster_jobs.display import Display


@pytest.mark.parametrize(("round", "words"), [(2, "train, round 2: 3/12"), (-1, "train: 3/12")])
def test_a_method_without_rounds_shows_none(round: int, words: str) -> None:
    told = io.StringIO()
    with Display(Console(file=told, width=200)) as display:
        display({"progress": True, "round": round, "done": 3, "of": 12, "loss": 1.0,
                 "images_per_s": 9.0, "waiting": 0.1})  # fmt: skip
    assert told.getvalue().startswith(words)
