from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepclust import checkpoint
from deepclust.checkpoint import State
from deepclust.errors import RunHeldError
from deepclust.files import read_json, write_json
from deepclust.lock import hold
from deepclust.rundir import Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with hold(tmp_path) as token:
        yield Run(tmp_path, token)


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3,), value)}, "body": {"0": torch.zeros(3)}}


def save(run: Run, step: int, keep: int = 3) -> bool:
    return checkpoint.save(run, State(step=step, segment=1, offset=2), parts(step), keep)


def test_what_is_saved_is_loaded(run: Run) -> None:
    save(run, 7)
    found = checkpoint.load_latest(run, print)
    assert found is not None
    assert found.state == State(step=7, segment=1, offset=2)
    assert torch.equal(found.parts["model"]["w"], torch.full((3,), 7.0))


def test_only_the_newest_are_kept(run: Run) -> None:
    for step in range(5):
        save(run, step, keep=2)
    assert [folder.name for folder in run.checkpoints()] == ["00000003", "00000004"]


def test_a_step_is_saved_once(run: Run) -> None:
    assert save(run, 1)
    assert not save(run, 1)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(run: Run, damage: str) -> None:
    save(run, 1)
    save(run, 2)
    file = run.checkpoints()[-1] / ("state.json" if damage == "state" else "model.safetensors")
    data = file.read_bytes()
    damaged = {"cut": data[:-5], "flip": data[:-1] + bytes([data[-1] ^ 1]), "state": b"{"}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    said: list[str] = []
    found = checkpoint.load_latest(run, said.append)
    assert found is not None
    assert found.state.step == 1
    assert "00000002" in said[0]
    assert save(run, 2)  # its place is free again


def test_no_checkpoint_is_none(run: Run) -> None:
    assert checkpoint.load_latest(run, print) is None


def test_a_zombie_cannot_land_a_checkpoint(run: Run) -> None:
    lock = run.path / "lock.json"
    write_json(lock, {**read_json(lock), "token": "another"})
    with pytest.raises(RunHeldError):
        save(run, 1)
    assert run.checkpoints() == []
