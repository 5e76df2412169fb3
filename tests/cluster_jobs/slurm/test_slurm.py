"""Runs on a real Slurm of two nodes: submitted, followed, signalled, cancelled, preempted."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster_jobs import job_file
from cluster_jobs.slurm import queue
from deepclust import Recipe, pretrain
from tests.cluster_jobs.ray.nodes import events, placed_at
from tests.cluster_jobs.slurm.slurm_faults import (
    FAULTS,
    job_folders,
    starts,
    until,
    until_gone,
    watched,
)
from tests.cluster_jobs.slurm.slurm_here import SlurmHere
from tests.killing import stages_done_twice, training
from tests.tiny import assert_same_run, deepclust, tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.root]

LAUNCHERS = ("srun", "ray")
LONG = 12  # epochs, each a round of a second or two, so that something comes in between
NODES = ("slurm.nodes=2", "slurm.start=60")


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
        begun.append(str(job_file.read(run)["job"]))
        return begun[-1]

    yield submit
    for number in begun:
        slurm.call("scancel", number)
        slurm.wait(number)
        until_gone(slurm, number)


def state(run: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(deepclust("status", run, "--json").stdout)
    return found[0]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_on_two_nodes_does_what_local_ranks_do(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path,
    launcher: str,
) -> None:  # fmt: skip
    run, before = tmp_path / "a run; echo 'no' \"more\"", job_folders()
    number = begin(run, f"slurm.launcher={launcher}", "slurm.snapshot=true")
    assert state(run)["state"] in ("PENDING", "RUNNING")
    with watched(slurm, run, number) as disagreements:
        log = deepclust("logs", run, "-f").stdout
    assert disagreements == []
    assert "finished" in log
    assert slurm.wait(number) == "COMPLETED"
    assert state(run)["state"] == "SUCCEEDED"
    assert f"code in {run / 'slurm' / 'source-0'}" in log
    name = slurm.call("sacct", "-X", "-n", "-P", "-j", number, "-o", "JobName").strip()
    assert name == run.name.replace('"', "`")  # as Slurm's accounting writes a quote
    assert_same_run(run, local(3))
    until_gone(slurm, number)
    assert job_folders() <= before


@pytest.mark.parametrize(
    ("kind", "launcher"),
    [
        ("preempted", "srun"), ("time limit", "srun"),  # both send USR2
        ("kill -9 of the head", "srun"), ("kill -9 of Ray's head", "ray"),
        ("slurmd and its tree", "srun"),  # tools/bench/slurm/faults.py goes through all
    ],
)  # fmt: skip
def test_a_job_resumes_by_itself_to_the_undisturbed_result_after(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path,
    kind: str, launcher: str,
) -> None:  # fmt: skip
    run, fault = tmp_path / "run", FAULTS[kind]
    number = begin(
        run, f"slurm.launcher={launcher}", f"train.epochs={fault.epochs}", *fault.overrides
    )
    with watched(slurm, run, number) as disagreements:
        until(lambda: training(run))
        fault.strike(slurm, run, number)
        assert slurm.wait(number, patience=240) == "COMPLETED"
    assert disagreements == []
    assert starts(run, number) > 1
    assert state(run)["state"] == "SUCCEEDED"
    assert_same_run(run, local(fault.epochs))
    assert stages_done_twice(run) == []
    until_gone(slurm, number)


def test_scancel_ends_a_job_and_leaves_nothing_running(
    slurm: SlurmHere, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.launcher=ray", "train.epochs=100")
    until(lambda: training(run))
    slurm.call("scancel", number)
    assert slurm.wait(number) == "CANCELLED"
    until_gone(slurm, number)
    assert state(run)["state"] == "STOPPED"
    assert len(events(run, "started")) == 1


def test_cancel_stops_at_a_step_and_resume_queues_a_new_job_that_finishes(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = begin(run, "slurm.launcher=srun", f"train.epochs={LONG}")
    until(lambda: training(run))
    assert "was stopped" in deepclust("cancel", run).stderr
    assert slurm.wait(first) == "CANCELLED"
    assert state(run)["state"] == "STOPPED"
    deepclust("resume", run, "--on", "slurm", "slurm.nodes=1")
    second = str(job_file.read(run)["job"])
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
    deepclust("resume", run, "--on", "slurm", code=7)
    assert "was stopped" in deepclust("cancel", run).stderr
    assert slurm.wait(number) == "CANCELLED"
    assert state(run)["state"] == "STOPPED"


def test_a_rank_that_is_lost_is_named_and_begins_again_in_the_same_job(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.launcher=srun", f"train.epochs={LONG}")
    until(lambda: training(run))
    os.kill(placed_at(run, "rank 1")["pid"], signal.SIGKILL)
    assert slurm.wait(number) == "COMPLETED"
    assert [(f["who"], f["cause"]) for f in events(run, "fault")] == [("rank 1", "death")]
    assert starts(run, number) == 1
    assert_same_run(run, local(LONG))
    until_gone(slurm, number)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_task_that_is_lost_is_named_and_the_job_is_queued_again(
    slurm: SlurmHere, begin: Callable[..., str], local: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(run, "slurm.launcher=srun", f"train.epochs={LONG}")
    until(lambda: training(run))
    warm_process = parent(placed_at(run, "rank 1")["pid"])
    os.kill(parent(warm_process), signal.SIGKILL)
    assert slurm.wait(number) == "COMPLETED"
    assert "rank 1 on n2 was lost" in events(run, "stopped")[0]["text"]
    assert_same_run(run, local(LONG))


def test_bad_data_ends_the_job_once_with_the_reason(
    slurm: SlurmHere, shards: Path, tmp_path: Path
) -> None:
    tiny_recipe(tmp_path / "nothing", "train.ranks=2").save(tmp_path / "bad.yaml")
    run = tmp_path / "run"
    deepclust("submit", tmp_path / "bad.yaml", "--on", "slurm", "--run", run, *NODES)
    number = str(job_file.read(run)["job"])
    assert slurm.wait(number) == "FAILED"
    found = state(run)
    assert (found["state"], found["exit_code"]) == ("FAILED", 3)
    assert "no shard" in found["reason"]
    assert starts(run, number) == 1


def test_a_sweep_is_one_array_whose_runs_lie_side_by_side(
    slurm: SlurmHere, shards: Path, tmp_path: Path
) -> None:
    recipe(shards, "train.ranks=1").save(tmp_path / "tiny.yaml")
    words = ["submit", tmp_path / "tiny.yaml", "--on", "slurm", "--run", tmp_path / "runs"]
    deepclust(*words, "--sweep", "cluster.k=4,6,8", "slurm.launcher=srun")
    runs = [tmp_path / "runs" / f"cluster.k={k}" for k in (4, 6, 8)]
    numbers = [str(job_file.read(run)["job"]) for run in runs]
    array = numbers[0].partition("_")[0]
    assert numbers == [f"{array}_{n}" for n in range(3)]
    assert [slurm.wait(number) for number in numbers] == ["COMPLETED"] * 3
    found = json.loads(deepclust("status", tmp_path / "runs", "--json").stdout)
    assert [one["name"] for one in found] == [run.name for run in runs]
    assert [one["k"] for one in found] == [4, 6, 8]
    assert {one["state"] for one in found} == {"SUCCEEDED"}
    told = queue.poll_all([*numbers, "99999"])  # of which Slurm never heard
    assert [getattr(told[number], "state", None) for number in numbers] == ["COMPLETED"] * 3
    assert told["99999"] is None


def test_nodes_with_different_numbers_of_gpus_have_a_rank_for_each_but_the_workers(
    slurm: SlurmHere, begin: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = begin(
        run, "slurm.gpus=3", "slurm.cpus_per_node=3", "train.device=auto", "train.epochs=1"
    )
    assert slurm.wait(number) == "COMPLETED"
    members = events(run, "placed")[0]["members"]
    assert sorted(member["who"] for member in members) == ["cluster worker", "rank 0", "rank 1"]


def test_the_plain_script_does_the_same_without_submitit(
    slurm: SlurmHere, shards: Path, local: Callable[[int], Path], tmp_path: Path
) -> None:
    run, script = tmp_path / "run", Path(__file__).parents[3] / "slurm" / "srun-cpu.sbatch"
    recipe(shards, "train.ranks=1").save(tmp_path / "tiny.yaml")
    words = ["--cpus-per-task=1", "-o", tmp_path / "out", f"--export=ALL,PYTHON={sys.executable}"]
    number = slurm.call("sbatch", "--parsable", *words, script, tmp_path / "tiny.yaml", run).strip()
    assert slurm.wait(number) == "COMPLETED", (tmp_path / "out").read_text()
    assert_same_run(run, local(3))
    assert state(run)["state"] == "SUCCEEDED"
