from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepclust.errors import DataError, DeepclustError, RunHeldError
from deepclust.files import read_json, write_json
from deepclust.run import checkpoint, checkpoint_writer
from deepclust.run.checkpoint import OwnedTensors, State
from deepclust.run.directory import Run, seal, sweep
from deepclust.run.lock import hold
from deepclust.world import ALONE, Owned, World
from tests.ranks import on_ranks


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with hold(tmp_path) as token:
        yield Run(tmp_path, token)


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3,), value)}, "body": {"0": torch.zeros(3)}}


def save(run: Run, step: int, keep: int = 3) -> bool:
    return checkpoint_writer.save(run, State(step=step, segment=1, offset=2), parts(step), keep)


def test_what_is_saved_is_loaded(run: Run) -> None:
    save(run, 7)
    latest = checkpoint.load_latest(run, print)
    assert latest is not None
    assert latest.state == State(step=7, segment=1, offset=2)
    assert torch.equal(latest.parts["model"]["w"], torch.full((3,), 7.0))


def test_only_the_newest_are_kept(run: Run) -> None:
    for step in range(5):
        save(run, step, keep=2)
    assert [folder.name for folder in run.checkpoints()] == ["00000003", "00000004"]


def test_a_step_is_saved_once(run: Run) -> None:
    assert save(run, 1)
    assert not save(run, 1)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(run: Run, damage: str) -> None:
    save(run, 1)
    save(run, 2)
    file = run.checkpoints()[-1] / ("state.json" if damage == "state" else "model.safetensors")
    data = file.read_bytes()
    damaged = {"cut": data[:-5], "flip": data[:-1] + bytes([data[-1] ^ 1]), "state": b"{"}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    warnings: list[str] = []
    latest = checkpoint.load_latest(run, warnings.append)
    assert latest is not None
    assert latest.state.step == 1
    assert "00000002" in warnings[0]
    assert save(run, 2)  # its place is free again


def test_no_checkpoint_is_none(run: Run) -> None:
    assert checkpoint.load_latest(run, print) is None


def test_a_process_that_lost_the_run_cannot_publish_a_checkpoint(run: Run) -> None:
    lock = run.path / "lock.json"
    write_json(lock, {**read_json(lock), "token": "another"})
    with pytest.raises(RunHeldError):
        save(run, 1)
    assert run.checkpoints() == []


ROWS = 7  # of the parameter whose rows are shared out
WHOLE = torch.arange(2.0 * ROWS * 3).view(2, ROWS, 3)


def ranges(world: World, rows: int = ROWS) -> dict[str, Owned]:
    """A parameter and its momentum, and one with a single row: most ranks have none of it."""
    return {
        "model/sub.weight": Owned.of(rows, world, dim=1),
        "head/sub.weight": Owned.of(rows, world, dim=1),
        "model/one": Owned.of(1, world, dim=0),
    }


def slices(world: World, shift: float = 0.0) -> OwnedTensors:
    own = ranges(world)
    weight, one = own["model/sub.weight"], own["model/one"]
    mine = WHOLE[:, weight.start : weight.stop] + shift
    return {
        "model/sub.weight": (mine, weight),
        "head/sub.weight": (-mine, weight),
        "model/one": (torch.full((one.count,), 5.0), one),
    }


def save_owned(world: World, run: Run, step: int) -> bool:
    whole = parts(step) if world.is_first else {}
    saved = checkpoint_writer.save(run, State(step=step), whole, 3, slices(world, step), world)
    world.barrier()  # gloo: who leaves early is missed by those who still join
    return saved


def load_owned(world: World, folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_owned(folder, ranges(world))


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_owned_rows_are_read_by_any_number_of_ranks(run: Run, writers: int, readers: int) -> None:
    assert on_ranks(writers, save_owned, run, 4) == [True] * writers
    assert on_ranks(writers, save_owned, run, 4) == [False] * writers
    (folder,) = run.checkpoints()
    by_rank = [load_owned(World(rank, readers), folder) for rank in range(readers)]
    weight = torch.cat([f["model/sub.weight"] for f in by_rank], 1)
    assert torch.equal(weight, WHOLE + 4)
    assert torch.equal(torch.cat([f["head/sub.weight"] for f in by_rank], 1), -weight)
    assert torch.cat([f["model/one"] for f in by_rank]).tolist() == [5.0]
    assert checkpoint.owned_names(folder) == set(ranges(ALONE))
    state, whole = checkpoint.load(folder)
    assert (state.step, sorted(whole)) == (4, ["body", "model"])  # rank 0's parts alone
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no scratch is left


def test_without_owned_tensors_no_rank_waits_for_another(run: Run) -> None:
    far = World(rank=0, size=64)  # any collective would fail: there is no group
    assert checkpoint_writer.save(run, State(step=1), parts(1), 3, {}, far)
    assert sorted(f.name for f in run.checkpoints()[0].glob("*.safetensors")) == [
        "body.safetensors",
        "model.safetensors",
    ]
    assert checkpoint.owned_names(run.checkpoints()[0]) == set()


class Doomed(Run):
    """A run whose holder is killed when all is written and nothing is published."""

    def commit(self, *args: Any, **facts: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_before_the_commit_leaves_the_older_checkpoint(run: Run) -> None:
    save_owned(ALONE, run, 1)
    doomed = Doomed(run.path, run.token)
    victim = multiprocessing.get_context("spawn").Process(
        target=save_owned, args=(ALONE, doomed, 2)
    )
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    folder = run.path / "checkpoints"
    assert len(list(folder.glob(f".owned-00000002-{run.token}-*.tmp/owned-00000.safetensors"))) == 1
    latest = checkpoint.load_latest(run, pytest.fail)
    assert latest is not None
    assert latest.state.step == 1
    assert torch.equal(load_owned(ALONE, latest.folder)["model/sub.weight"], WHOLE + 1)
    sweep(run.path)
    assert [p.name for p in folder.iterdir()] == ["00000001"]
    assert save_owned(ALONE, run, 2)


def attempt(world: World, run: Run, spoil: int) -> str:
    """Save, while one rank has a tensor that cannot be written; what came of it."""
    owned = slices(world)
    if world.rank == spoil:
        weight, own = owned["model/sub.weight"]
        owned["model/sub.weight"] = (weight.to("meta"), own)
    try:
        checkpoint_writer.save(run, State(step=1), parts(1), 3, owned, world)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.parametrize("spoil", [0, 1])
def test_a_rank_that_cannot_write_is_an_error_on_all(run: Run, spoil: int) -> None:
    outcomes = on_ranks(2, attempt, run, spoil)
    assert outcomes[1 - spoil].startswith("FollowedError: checkpoint ")
    assert f"rank {spoil} failed" in outcomes[1 - spoil]
    assert outcomes[spoil].startswith("NotImplementedError")
    assert list((run.path / "checkpoints").iterdir()) == []
    assert on_ranks(2, attempt, run, -1) == ["saved"] * 2


def test_a_lost_lock_is_an_error_on_all(run: Run) -> None:
    lock = run.path / "lock.json"
    write_json(lock, {**read_json(lock), "token": "another"})
    first, second = on_ranks(2, attempt, run, -1)
    assert first.startswith("RunHeldError")
    assert "rank 0 failed" in second
    assert list((run.path / "checkpoints").iterdir()) == []


def lose(folder: Path) -> None:
    """An owner's file goes, and the manifest is made to agree."""
    (folder / "owned-00001.safetensors").unlink()
    for name in ("manifest.json", "DONE"):
        (folder / name).unlink()
    seal(folder, {})


def test_a_range_that_no_file_holds_is_named(run: Run) -> None:
    on_ranks(2, save_owned, run, 1)
    (folder,) = run.checkpoints()
    lose(folder)
    with pytest.raises(DataError, match=r"00000001 lacks rows 4 to 6 of model/sub.weight.*Copy"):
        load_owned(ALONE, folder)
    with pytest.raises(DataError, match="lacks model/new"):
        checkpoint.load_owned(folder, {"model/new": Owned.of(2, ALONE, dim=0)})
    with pytest.raises(DataError, match=r"owned-00000.*holds .*of 7 rows .* not of 9"):
        checkpoint.load_owned(folder, ranges(ALONE, 9))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_owners_file_sets_the_checkpoint_aside(
    run: Run, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        save_owned(ALONE, run, step)
    damage(run.checkpoints()[-1] / "owned-00000.safetensors")
    warnings: list[str] = []
    latest = checkpoint.load_latest(run, warnings.append)
    assert latest is not None
    assert latest.state.step == 1
    assert "owned-00000.safetensors" in warnings[0]


def test_a_malformed_owners_file_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "owned-00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DeepclustError, match="cannot be read"):
        load_owned(ALONE, tmp_path)


@pytest.mark.parametrize(
    "other", [torch.nn.Linear(2, 4), torch.nn.Conv2d(2, 3, 1), torch.nn.ReLU()]
)
def test_weights_of_another_network_are_a_data_error(other: torch.nn.Module) -> None:
    weights = dict(torch.nn.Linear(2, 3).state_dict())
    with pytest.raises(DataError, match="checkpoint c is not of the network"):
        checkpoint.put_weights(other, weights, "checkpoint c")


def test_weights_that_are_elsewhere_may_be_absent() -> None:
    checkpoint.put_weights(torch.nn.Linear(2, 3), {"weight": torch.ones(3, 2)}, "it", {"bias"})
