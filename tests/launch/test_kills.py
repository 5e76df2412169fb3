"""kill -9 at every kind of moment: the resumed run is the undisturbed one, bit for bit.

One case of each kind: `kills.py`, `instants.py` and `faults.py` in tools/bench go through all.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from deepclust import Recipe, pretrain
from deepclust.errors import RequeueWanted
from deepclust.launch import policy
from deepclust.run.directory import Run
from tests.forks import in_fork
from tests.instants import INSTANTS, SETTINGS, kill_and_resume
from tests.killing import (
    MOMENTS,
    PATIENCE_S,
    family,
    kill_when,
    role,
    stages_done_twice,
    start,
    strike,
    wait_until_gone,
)
from tests.tiny import assert_same_run, deepclust, tiny_recipe

pytestmark = pytest.mark.slow

# Moments of milliseconds: the kill may strike just behind them. tools/bench/kills.py tries again.
SHORT = {"between centroids and assignments", "checkpoint write"}


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
        ("extraction", 2), ("k-means", 1), ("between centroids and assignments", 2),
        ("checkpoint write", 1),
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


@pytest.mark.parametrize(
    "name",
    ["checkpoint: some tensors are", "checkpoint: renamed", "chunk: before the rename"],
)
def test_a_kill_at_an_instant_of_a_committing_thread_changes_no_bit(
    many_shards: Path, undisturbed: dict[int, Path], tmp_path: Path, name: str
) -> None:
    tiny_recipe(many_shards, *SETTINGS).save(tmp_path / "recipe.yaml")
    run = tmp_path / "run"
    code = in_fork(kill_and_resume, tmp_path / "recipe.yaml", run, INSTANTS[name])
    assert code == -signal.SIGKILL
    assert_same_run(run, undisturbed[1])
    assert stages_done_twice(run) == []


@pytest.mark.parametrize(
    ("victim", "number", "moment", "cause"),
    [
        ("rank 1", signal.SIGKILL, "extraction", "death"),
        ("cluster worker", signal.SIGSTOP, "extraction", "hang"),  # later it may not be needed
        ("reader", signal.SIGKILL, "mid-epoch", "error"),
    ],
)
def test_a_group_that_loses_a_process_restarts_without_losing_work(
    many_shards: Path, undisturbed: dict[int, Path], tmp_path: Path, victim: str, number: int,
    moment: str, cause: str,
) -> None:  # fmt: skip
    run, file = tmp_path / "run", recipe(many_shards, tmp_path, 2)
    workers, hang = (1, 12) if victim == "reader" else (0, 6)  # readers take seconds to come up
    if cause == "error":  # no silence is waited for
        hang = 60
    settings = (f"train.hang={hang}", f"data.workers={workers}")
    Recipe.load(file).replace(*settings).save(file)
    process = start("pretrain", file, "--run", run)
    members = strike(process, run, MOMENTS[moment], victim, number)
    assert process.wait(PATIENCE_S) == 0
    wait_until_gone(members)
    faults = [event for event in Run(run).events() if event["event"] == "fault"]
    named = "rank 1" if victim == "reader" else victim
    assert [(f["who"], f["cause"]) for f in faults] == [(named, cause)], faults
    assert_same_run(run, undisturbed[2])
    assert stages_done_twice(run) == []


def test_a_run_whose_faults_exceed_the_budget_ends_and_names_the_last(
    many_shards: Path, tmp_path: Path
) -> None:
    run, file = tmp_path / "run", recipe(many_shards, tmp_path, 2)
    Recipe.load(file).replace("train.restarts=0").save(file)
    process = start("pretrain", file, "--run", run)
    strike(process, run, MOMENTS["mid-epoch"], "rank 1", signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 4
    stopped = Run(run).events()[-1]
    assert stopped["event"] == "stopped"
    assert "more faults than train.restarts=0 allows" in stopped["text"]
    assert "rank 1, death: was killed by signal 9" in stopped["text"]


@pytest.mark.new_interpreters
def test_a_rank_that_does_not_stop_when_asked_is_killed_and_the_run_resumes(
    many_shards: Path, undisturbed: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def show(record: dict[str, Any]) -> None:
        if record.get("progress") and record.get("step") == 3:
            for pid in family(os.getpid()):
                if role(pid, 0) == "rank 1":
                    os.kill(pid, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(policy.Policy, "of", classmethod(lambda cls, _: cls(stop=1.0)))
    with pytest.raises(RequeueWanted, match="did not stop within 1 s and was killed"):
        pretrain(Recipe.load(recipe(many_shards, tmp_path, 2)), run, show)
    deepclust("resume", run)
    assert_same_run(run, undisturbed[2])


def test_a_resumed_run_may_have_another_number_of_ranks(
    many_shards: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(many_shards, tmp_path, 1), "--run", run)
    assert kill_when(process, run, MOMENTS["mid-epoch"], delay=0.0)
    assert process.returncode == -signal.SIGKILL
    deepclust("resume", run, "train.ranks=2")
    resumed = [(r["step"], r["round"], r["epoch"]) for r in Run(run).metrics("train")]
    whole = [(r["step"], r["round"], r["epoch"]) for r in Run(undisturbed[1]).metrics("train")]
    assert resumed == whole
