"""Raw rows that stay in memory until they are projected: the same bits, and what a kill costs."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust import pretrain
from deepclust.clustering import residence
from deepclust.run.directory import Run
from deepclust.stages import raw_memory
from deepclust.stages.raw_memory import RawMemory
from tests.forks import in_fork
from tests.instants import Instant, kill_and_resume, leave_alone
from tests.tiny import assert_same_run, tiny_recipe

SETTINGS = ("train.batch=60", "keep.features=5")
PROJECTION = Instant("", "deepclust.pipeline", "project", 2)  # that of round 1


def recipe(shards: Path, folder: Path, *overrides: str) -> Path:
    tiny_recipe(shards, *SETTINGS, *overrides).save(folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def on_disk(many_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    in_fork(leave_alone, recipe(many_shards, folder), folder / "run")
    return folder / "run"


def with_little_room(recipe: Path, run: Path, share: float) -> list[bool]:
    """Run where memory holds a share of a round's rows; return which chunks stayed there."""
    stayed: list[bool] = []
    inner = RawMemory.takes

    def takes(self: RawMemory, size: int) -> bool:
        raw_memory.free_memory = lambda: 4 * size * share / raw_memory.SHARE_OF_HOST
        stayed.append(inner(self, size))
        return stayed[-1]

    RawMemory.takes = takes
    pretrain(recipe, run)
    return stayed


@pytest.mark.slow
def test_rows_in_memory_and_rows_on_disk_make_the_same_run(
    many_shards: Path, on_disk: Path, tmp_path: Path
) -> None:
    given = recipe(many_shards, tmp_path, "cluster.raw=memory")
    stayed = in_fork(with_little_room, given, tmp_path / "run", 0.6)
    assert stayed == [True, True, False, False] * 2  # chunks of two rounds
    assert_same_run(tmp_path / "run", on_disk)


@pytest.mark.slow
def test_a_kill_before_the_projection_costs_the_extraction_again_and_no_bit(
    many_shards: Path, on_disk: Path, tmp_path: Path
) -> None:
    given = recipe(many_shards, tmp_path, "cluster.raw=memory")
    code = in_fork(kill_and_resume, given, tmp_path / "run", PROJECTION)
    assert code == -signal.SIGKILL
    assert_same_run(tmp_path / "run", on_disk)
    events = Run(tmp_path / "run").events()
    told = [event["text"] for event in events if event["event"] == "warning"]
    assert any("the rows of 4 chunks of round 1 were in the memory" in text for text in told)
    assert len([e for e in events if e["event"] == "extracted" and e["round"] == 1]) == 2


@pytest.mark.slow
def test_each_rank_projects_the_rows_that_it_holds(
    many_shards: Path, on_disk: Path, tmp_path: Path
) -> None:
    given = recipe(many_shards, tmp_path, "cluster.raw=memory", "train.ranks=2", "train.epochs=1")
    in_fork(leave_alone, given, tmp_path / "run")
    ours, theirs = (run / "rounds/0000/features/rows.npy" for run in (tmp_path / "run", on_disk))
    np.testing.assert_array_equal(np.load(ours), np.load(theirs))


@pytest.mark.parametrize(
    ("where", "device", "room"),
    [("disk", "cuda", 0), ("auto", "cpu", 0), ("auto", "cuda", 50), ("memory", "cuda", 50),
     ("memory", "cpu", 30)],
)  # fmt: skip
def test_memory_is_that_of_the_device_and_a_cpus_is_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, where: raw_memory.Where, device: str, room: int
) -> None:
    monkeypatch.setitem(residence.MEMORY, "cuda", lambda device: 100)
    monkeypatch.setattr(raw_memory, "free_memory", lambda: 120.0)
    memory = RawMemory(where, torch.device(device), ranks=2)
    assert memory.takes(room)
    assert not memory.takes(1)
