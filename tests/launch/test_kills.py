"""kill -9 at every kind of moment: the resumed run is the undisturbed one, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from deepclust.run.directory import Run
from tests.killing import MOMENTS, kill_when, stages_done_twice, start
from tests.tiny import assert_same_run, deepclust, tiny_recipe

pytestmark = pytest.mark.slow

# Moments of milliseconds: the kill may strike just behind them. tools/bench/kills.py tries again.
SHORT = {"whitening", "between centroids and assignments", "checkpoint write"}


@pytest.fixture(scope="module")
def undisturbed(many_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2):
        recipe(many_shards, folder, ranks)
        deepclust("pretrain", folder / f"{ranks}.yaml", "--run", folder / f"run-{ranks}")
    return {ranks: folder / f"run-{ranks}" for ranks in (1, 2)}


def recipe(many_shards: Path, folder: Path, ranks: int) -> Path:
    """Checkpoints every 10 steps, 20 steps an epoch, an extraction of several units."""
    settings = (f"train.ranks={ranks}", "train.batch=60", "train.checkpoint=10 steps")
    tiny_recipe(many_shards, *settings).save(folder / f"{ranks}.yaml")
    return folder / f"{ranks}.yaml"


@pytest.mark.parametrize(
    ("moment", "ranks"),
    [
        ("extraction", 1), ("extraction", 2), ("whitening", 2), ("k-means", 1), ("k-means", 2),
        ("between centroids and assignments", 1), ("between centroids and assignments", 2),
        ("mid-epoch", 1), ("mid-epoch", 2), ("checkpoint write", 1),
    ],
)  # fmt: skip
def test_a_killed_run_resumes_to_the_same_bits(
    many_shards: Path, undisturbed: dict[int, Path], tmp_path: Path, moment: str, ranks: int
) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(many_shards, tmp_path, ranks), "--run", run)
    struck = kill_when(process, run, MOMENTS[moment], delay=0.0)
    assert process.returncode == -signal.SIGKILL
    assert struck or moment in SHORT
    deepclust("resume", run)
    assert_same_run(run, undisturbed[ranks])
    assert stages_done_twice(run) == []


def test_a_killed_rank_stops_the_gang_and_is_named(many_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(many_shards, tmp_path, 2), "--run", run)
    assert kill_when(process, run, MOMENTS["mid-epoch"], delay=0.0, victim="rank 1")
    assert process.returncode == 4
    stopped = Run(run).events()[-1]
    assert stopped["event"] == "stopped"
    assert "rank 1 was killed by signal 9" in stopped["text"]


def test_a_resumed_run_may_have_another_number_of_ranks(
    many_shards: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(many_shards, tmp_path, 1), "--run", run)
    assert kill_when(process, run, MOMENTS["mid-epoch"], delay=0.0)
    assert process.returncode == -signal.SIGKILL
    deepclust("resume", run, "train.ranks=2")
    told = [(r["step"], r["round"], r["epoch"]) for r in Run(run).metrics("train")]
    whole = [(r["step"], r["round"], r["epoch"]) for r in Run(undisturbed[1]).metrics("train")]
    assert told == whole
