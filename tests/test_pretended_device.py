"""Whole runs on the pretended device: a method may wait for a GPU as often as the table says.

The table `waits.json` may only fall, and has the numbers of kernels too. Where it can fall, a test
says how to write it again.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from deepclust.methods import METHODS
from tests.forks import in_fork
from tests.pretended_device import Mixed, on_card, pretended
from tests.pretended_run import main, run_method

TABLE = Path(__file__).parent / "waits.json"
KERNELS, ROOM = "kernels of a ", 0.1  # versions of torch differ by a few kernels, not by waits
AGAIN = "DEEPCLUST_WRITE_WAITS=1 pytest tests/test_pretended_device.py"


def check(name: str, now: dict[str, int], waits: list[tuple[str, str, int]]) -> None:
    """Compare with the table, or write it."""
    table = json.loads(TABLE.read_text())
    if os.environ.get("DEEPCLUST_WRITE_WAITS") == "1":
        TABLE.write_text(json.dumps({**table, name: now}, indent=1, sort_keys=True) + "\n")
        return
    listed = "\n".join(f"{phase}: {count} x {where}" for phase, where, count in waits)
    apart = {
        key: (table[name][key], n)
        for key, n in now.items()
        if abs(n - table[name][key]) > key.startswith(KERNELS) * ROOM * table[name][key]
    }
    more = {key: (allowed, n) for key, (allowed, n) in apart.items() if n > allowed}
    assert not more, f"{name} asks more of a GPU (allowed, now): {more}\n{listed}"
    if apart:
        warnings.warn(f"{name} asks less (allowed, now): {apart}. Run {AGAIN}", stacklevel=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_run_waits_for_the_device_no_more_often_than_it_did(
    name: str, shards: Path, tmp_path: Path
) -> None:
    told = in_fork(run_method, name, 1, shards, tmp_path, "train.epochs=1")
    check(name, told["table"], told["waits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_ranks_keep_to_the_rules_of_nccl(name: str, shards: Path, tmp_path: Path) -> None:
    told = in_fork(run_method, name, 2, shards, tmp_path, "train.epochs=1")
    names = ("step", f"{KERNELS}step")  # which rank extracts what is decided by their speed
    step = {key: told["table"][key] for key in names}
    check(f"{name} on 2 ranks", step, told["waits"])


@pytest.mark.slow
def test_the_command_shows_where_two_ranks_wait(capsys: pytest.CaptureFixture[str]) -> None:
    main("simclr", "2", "train.epochs=1")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step ") for line in lines)
    assert lines[-1].startswith("{'step': 0")


def test_devices_are_not_mixed_and_waits_are_counted() -> None:
    with pretended() as log:
        rows = torch.ones(3, 2).to("cuda")
        assert on_card(rows[1:].T + 1)
        assert rows.to("cuda") is rows
        assert not on_card(rows.cpu())
        with pytest.raises(Mixed):
            rows + torch.ones(3, 2)
        with pytest.raises(TypeError, match="numpy"):
            rows.numpy()
        with log.within("told"):
            assert rows.sum().item() == 6.0
            assert len(rows[rows[:, 0] > 0]) == 3
            rows.tolist()
        with log.within("free"):
            torch.ones(3).pin_memory().to("cuda", non_blocking=True)
            rows[rows > 0] = 0
    assert (log.count("told"), log.count("free")) == (3, 0)
    assert rows.device.type == "cpu"
