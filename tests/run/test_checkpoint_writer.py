"""Checkpoints that a thread writes: from copies, one at a time, and what goes wrong is raised."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepclust.errors import DiskError, NumericalError, RunHeldError
from deepclust.files import read_json, write_json
from deepclust.run import checkpoint
from deepclust.run.checkpoint import State
from deepclust.run.checkpoint_writer import CheckpointWriter
from deepclust.run.directory import Run, sweep
from deepclust.run.lock import hold
from deepclust.stages.train_state import check_finite_weights
from deepclust.world import Owned, World
from tests.ranks import on_ranks


class Slow(Run):
    """A run whose commits wait until they may go on."""

    go = threading.Event()

    def commit(self, *args: Any, **facts: Any) -> None:
        self.go.wait(30)
        super().commit(*args, **facts)


class Full(Run):
    """A run on a full disk."""

    def commit(self, *args: Any, **facts: Any) -> None:
        raise DiskError("full")


class Killed(Run):
    """A run that is killed in its second checkpoint, just before the rename."""

    def fence(self) -> None:
        if self.checkpoints():
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Run]:
    with hold(tmp_path) as token:
        yield Run(tmp_path, token)


def newest(run: Run) -> tuple[int, float]:
    latest = checkpoint.load_latest(run, pytest.fail)
    assert latest is not None
    return latest.state.step, float(latest.parts["model"]["w"][0])


def test_a_checkpoint_holds_the_weights_of_its_step_though_training_goes_on(held: Run) -> None:
    run, weight, said = Slow(held.path, held.token), torch.ones(3), list[int]()
    run.go.clear()
    writer = CheckpointWriter(run, 3, done=said.append)
    assert writer.put(State(step=1), {"model": {"w": weight}})
    weight += 1
    writer.poll()
    assert (run.checkpoints(), said) == ([], [])
    run.go.set()
    assert writer.put(State(step=2), {"model": {"w": weight}})  # waits for the one before
    assert (newest(run)[0] >= 1, said) == (True, [1])
    writer.settle()
    writer.close()
    first, _ = run.checkpoints()
    assert checkpoint.load(first)[1]["model"]["w"].tolist() == [1.0] * 3
    assert (newest(run), said) == ((2, 2.0), [1, 2])
    assert not writer.put(State(step=2), {"model": {"w": weight}})


@pytest.mark.parametrize("where", ["poll", "put", "settle"])
def test_an_error_of_the_thread_is_raised_at_the_next_look(held: Run, where: str) -> None:
    writer = CheckpointWriter(Full(held.path, held.token), 3)
    writer.put(State(step=1), {"model": {"w": torch.ones(3)}})
    writer._published.exception()
    with pytest.raises(DiskError, match="full"):
        writer.put(State(step=2), {"model": {}}) if where == "put" else getattr(writer, where)()
    writer.close()


def test_weights_that_are_not_finite_are_not_saved(held: Run) -> None:
    writer = CheckpointWriter(held, 3, check=check_finite_weights)
    writer.put(State(step=7), {"model": {"w": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(NumericalError, match="at step 7 the weights are not finite"):
        writer.settle()
    assert held.checkpoints() == []


def test_a_writer_that_lost_the_run_publishes_nothing(held: Run) -> None:
    run = Slow(held.path, held.token)
    run.go.clear()
    writer = CheckpointWriter(run, 3)
    writer.put(State(step=1), {"model": {"w": torch.ones(3)}})
    lock = run.path / "lock.json"
    write_json(lock, {**read_json(lock), "token": "another"})
    run.go.set()
    with pytest.raises(RunHeldError, match="taken over by another controller"):
        writer.settle()
    assert run.checkpoints() == []


def save_two(path: Path, token: str) -> None:
    writer = CheckpointWriter(Killed(path, token), 3)
    for step in (1, 2):
        writer.put(State(step=step), {"model": {"w": torch.full((3,), float(step))}})
    writer.settle()


def test_a_kill_before_the_rename_leaves_the_checkpoint_before(held: Run) -> None:
    spawn = multiprocessing.get_context("spawn")
    victim = spawn.Process(target=save_two, args=(held.path, held.token))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert list((held.path / "checkpoints").glob(".*.tmp"))
    assert newest(held) == (1, 1.0)
    sweep(held.path)
    assert [f.name for f in (held.path / "checkpoints").iterdir()] == ["00000001"]


def train_on_slices(world: World, run: Run) -> list[str]:
    """Change the slices after each `put`; say what is there when all have settled."""
    own = Owned.of(7, world, dim=0)
    rows, writer = torch.zeros(own.count), CheckpointWriter(run, 3, world)
    for step in (1, 2):
        rows += 1
        writer.put(State(step=step), {"model": {}}, {"model/rows": (rows, own)})
        rows += 1
        writer.poll()
    writer.settle()
    writer.close()
    return [folder.name for folder in run.checkpoints()]


def test_slices_of_all_ranks_are_those_of_the_step(held: Run) -> None:
    assert on_ranks(2, train_on_slices, held) == [["00000001", "00000002"]] * 2
    whole = Owned.of(7, World(), dim=0)
    for folder, value in zip(held.checkpoints(), (1.0, 3.0), strict=True):
        rows = checkpoint.load_owned(folder, {"model/rows": whole})["model/rows"]
        assert rows.tolist() == [value] * 7
    names = {file.name for file in (held.path / "checkpoints").iterdir()}
    assert names == {"00000001", "00000002"}  # no scratch is left
