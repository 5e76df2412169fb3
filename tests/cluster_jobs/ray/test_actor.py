"""An actor's answers to the supervisor, without a Ray: when they are given, and when not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster_jobs.ray import actor


class Quiet:
    """Stands for a rank's process: it says what the test writes into its pipe."""

    def __init__(self) -> None:
        self.pipe, self.end = os.pipe()
        self.has_ended = False

    def fileno(self) -> int:
        return self.pipe

    def read(self) -> list[dict[str, Any]]:
        with os.fdopen(os.dup(self.pipe), "rb", buffering=0) as pipe:
            os.set_blocking(self.pipe, False)
            return [{"said": line} for line in (pipe.read(99) or b"").decode().split()]


@pytest.fixture
def rank() -> Iterator[Quiet]:
    process = Quiet()
    yield process
    process.has_ended = True


@pytest.fixture
def worker(rank: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[actor.Worker]:
    monkeypatch.setattr(actor, "Warm", lambda: None)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    keeper = actor.Worker(str(tmp_path))
    process: Any = rank
    keeper._process = process
    listens = threading.Thread(target=keeper._listen, args=(process,))
    listens.start()
    yield keeper
    rank.has_ended = True
    listens.join()


def test_a_question_is_kept_while_the_rank_says_nothing(worker: actor.Worker) -> None:
    began = time.monotonic()
    assert worker.news(0, 4 * actor.EXIT_POLL_S) == actor.News([], False)
    assert time.monotonic() - began > 3.9 * actor.EXIT_POLL_S


def test_a_question_is_answered_at_once_when_the_rank_says_something(
    worker: actor.Worker, rank: Quiet
) -> None:
    threading.Timer(0.1, os.write, (rank.end, b"hello\n")).start()
    assert worker.news(0, 600.0).records == [{"said": "hello"}]


def test_a_question_is_answered_when_the_rank_has_ended(worker: actor.Worker, rank: Quiet) -> None:
    rank.has_ended = True
    assert worker.news(0, 600.0) == actor.News([], True)


def test_a_question_of_a_rank_that_began_again_is_answered(worker: actor.Worker) -> None:
    threading.Timer(0.1, _replaced, (worker,)).start()
    assert worker.news(0, 600.0).records == []


def _replaced(worker: actor.Worker) -> None:
    with worker._something:
        worker._process = None
        worker._something.notify_all()
