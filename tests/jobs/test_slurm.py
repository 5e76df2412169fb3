"""Runs on a real Slurm of two nodes: submitted, followed, signalled, cancelled, preempted."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster_jobs import job
from deepclust import Recipe, pretrain
from tests.jobs.nodes import events, seated
from tests.jobs.slurm_here import SlurmHere
from tests.killing import stages_done_twice, training
from tests.tiny import assert_same_run, deepclust, tiny_recipe

pytestmark = pytest.mark.slow

LAUNCHERS = ("srun", "ray")
LONG = 8  # epochs, so that something comes in between
LONGER = 40  # until Slurm's scheduler has looked again
NODES = ("slurm.nodes=2", "slurm.start=60")
PATIENCE_S = 120.0


def recipe(shards: Path, *overrides: str) -> Recipe:
    return tiny_recipe(shards, "train.ranks=2", "train.epochs=3", *overrides)


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs of two local ranks that nobody disturbs, by their epochs."""
    folder = tmp_path_factory.mktemp("runs")

    def run(epochs: int) -> Path:
        if not (folder / str(epochs)).exists():
            pretrain(recipe(shards, f"train.epochs={epochs}"), folder / str(epochs))
        return folder / str(epochs)

    return run


@pytest.fixture
def begin(slurm: SlurmHere, shards: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submit a run by the command; its job is taken out of Slurm at the end."""
    begun: list[str] = []

    def submit(run: Path, *overrides: str) -> str:
        recipe(shards).save(tmp_path / "tiny.yaml")
        words = ["submit", tmp_path / "tiny.yaml", "--on", "slurm", "--run", run]
        deepclust(*words, *NODES, *overrides)
        begun.append(str(job.read(run)["job"]))
        return begun[-1]

    yield submit
    for number in begun:
        slurm.call("scancel", number)
        slurm.wait(number)
        until_gone(slurm, number)


def until(moment: Callable[[], Any], what: str = "the moment") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


def until_gone(slurm: SlurmHere, number: str) -> None:
    until(lambda: not slurm.processes(number), "the end of every process of the job")


def state(run: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(deepclust("status", run, "--json").stdout)
    return found[0]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_on_two_nodes_does_what_local_ranks_do(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path,
    launcher: str,
) -> None:  # fmt: skip
    run = tmp_path / "a run; echo 'no' \"more\""
    number = begin(run, f"slurm.launcher={launcher}", "slurm.snapshot=true")
    assert state(run)["state"] in ("PENDING", "RUNNING")
    told = deepclust("logs", run, "-f").stdout
    assert "finished" in told
    assert slurm.wait(number) == "COMPLETED"
    assert state(run)["state"] == "SUCCEEDED"
    assert (run / "slurm" / "source" / "deepclust" / "launch.py").exists()
    name = slurm.call("sacct", "-X", "-n", "-P", "-j", number, "-o", "JobName").strip()
    assert name == run.name.replace('"', "`")  # as Slurm's accounting writes a quote
    assert_same_run(run, local(3))
    until_gone(slurm, number)
    assert not list(Path("/tmp").glob(f"dc-job-{number}-*"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_usr2_stops_at_a_step_and_the_job_is_queued_again_and_resumes(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path,
    launcher: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    number = begin(run, f"slurm.launcher={launcher}", f"train.epochs={LONG}")
    until(lambda: training(run))
    slurm.call("scancel", "--signal=USR2", number)
    until(lambda: events(run, "stopped"))
    assert events(run, "stopped")[0]["kind"] == "RequeueWanted"
    until(lambda: len(events(run, "started")) == 2, "the second start")
    assert slurm.wait(number) == "COMPLETED"
    assert state(run)["state"] == "SUCCEEDED"
    assert_same_run(run, local(LONG))
    assert stages_done_twice(run) == []
    until_gone(slurm, number)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_scancel_ends_a_job_and_leaves_nothing_running(
    slurm: SlurmHere, begin: Callable[..., str], tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    number = begin(run, f"slurm.launcher={launcher}", "train.epochs=100")
    until(lambda: training(run))
    slurm.call("scancel", number)
    assert slurm.wait(number) == "CANCELLED"
    until_gone(slurm, number)
    assert state(run)["state"] == "STOPPED"
    assert len(events(run, "started")) == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_cancel_stops_at_a_step_and_resume_queues_a_new_job_that_finishes(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path,
    launcher: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    first = begin(run, f"slurm.launcher={launcher}", f"train.epochs={LONG}")
    until(lambda: training(run))
    assert "was stopped" in deepclust("cancel", run).stderr
    assert slurm.wait(first) == "CANCELLED"
    assert state(run)["state"] == "STOPPED"
    deepclust("resume", run, "--on", "slurm", "slurm.nodes=1")
    second = str(job.read(run)["job"])
    assert second != first
    assert slurm.wait(second) == "COMPLETED"
    assert_same_run(run, local(LONG))


def test_a_waiting_job_says_why_and_is_cancelled_before_it_starts(
    slurm: SlurmHere, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.sbatch={begin: now+1hour}")
    until(lambda: state(run)["state"] == "PENDING")
    assert "BeginTime" in state(run)["reason"]
    deepclust("resume", run, "--on", "slurm", code=4)
    assert "was stopped" in deepclust("cancel", run).stderr
    assert slurm.wait(number) == "CANCELLED"
    assert state(run)["state"] == "STOPPED"


def test_a_job_that_a_higher_partition_preempts_is_queued_again_and_resumes(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.launcher=srun", f"train.epochs={LONGER}", "slurm.exclusive=true")
    until(lambda: training(run))
    words = ("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 8")
    other = slurm.call("sbatch", "--parsable", *words).strip()
    assert slurm.wait(other) == "COMPLETED"
    assert slurm.wait(number) == "COMPLETED"
    assert len(events(run, "started")) == 2
    assert_same_run(run, local(LONGER))


def test_a_rank_that_is_killed_ends_the_job_with_its_name(
    slurm: SlurmHere, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.launcher=srun", "train.epochs=100")
    until(lambda: training(run))
    os.kill(seated(run, "rank 1")["pid"], signal.SIGKILL)
    assert slurm.wait(number) == "FAILED"
    found = state(run)
    assert found["state"] == "FAILED"
    assert "rank 1 on n2 was lost" in found["reason"]
    until_gone(slurm, number)


def test_a_head_that_is_killed_takes_all_with_it(
    slurm: SlurmHere, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.launcher=ray", "train.epochs=100")
    until(lambda: training(run))
    os.kill(events(run, "started")[0]["pid"], signal.SIGKILL)
    assert slurm.wait(number) == "FAILED"
    until_gone(slurm, number)
    assert state(run)["state"] == "FAILED"


def test_the_plain_script_does_the_same_without_submitit(
    slurm: SlurmHere, shards: Path, local: Callable[[int], Path], tmp_path: Path
) -> None:
    run, script = tmp_path / "run", Path(__file__).parents[2] / "slurm" / "srun-cpu.sbatch"
    recipe(shards, "train.ranks=1").save(tmp_path / "tiny.yaml")
    words = ["--cpus-per-task=1", "-o", tmp_path / "out", f"--export=ALL,PYTHON={sys.executable}"]
    number = slurm.call("sbatch", "--parsable", *words, script, tmp_path / "tiny.yaml", run).strip()
    assert slurm.wait(number) == "COMPLETED", (tmp_path / "out").read_text()
    assert_same_run(run, local(3))
    assert state(run)["state"] == "SUCCEEDED"
