"""A run in the caller's process leaves the process as it was, and there is one at a time."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepclust.errors import ResourceError
from deepclust.launch import start
from deepclust.launch.in_process import borrowed_process
from deepclust.run.reporting import log_to


def process_state() -> dict[str, Any]:
    """What a caller would notice."""
    logger = logging.getLogger("deepclust")
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(), "numpy": (name, numbers.tolist(), *rest),
        "torch": torch.get_rng_state().tolist(), "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(), "folder": os.getcwd(),
        "handlers": list(logger.handlers), "level": logger.level,
        "closed": [h.stream.closed for h in logger.handlers if isinstance(h, logging.FileHandler)],
        "environment": dict(os.environ), "descriptors": len(os.listdir("/proc/self/fd")),
        "signals": [signal.getsignal(n) for n in start.signal.valid_signals()],
    }  # fmt: skip


def disturb(tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("high")
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    log_to(tmp_path / "rank.log", 0).info("begin")
    os.environ["DEEPCLUST_TEST"] = "1"
    os.environ.pop("HOME", None)
    os.chdir(tmp_path)


@pytest.mark.parametrize("failing", [False, True])
def test_a_rank_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mine = logging.FileHandler(tmp_path / "mine.log")
    logging.getLogger("deepclust").addHandler(mine)
    before = process_state()
    try:
        with borrowed_process():
            disturb(tmp_path)
            assert process_state() != before
            if failing:
                raise KeyError("x")
    except KeyError:
        pass
    assert process_state() == before
    assert mine.stream.closed is False
    assert "begin" in (tmp_path / "mine.log").read_text()
    logging.getLogger("deepclust").removeHandler(mine)
    mine.close()


def test_two_ranks_in_one_process_are_refused_and_the_next_is_not() -> None:
    errors: list[Exception] = []

    def second() -> None:
        try:
            with borrowed_process():
                pass
        except ResourceError as error:
            errors.append(error)

    with borrowed_process():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        second()
    assert ["another run is under way in this process" in str(error) for error in errors] == [
        True
    ] * 2
    with borrowed_process():
        pass
