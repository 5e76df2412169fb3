"""The state of a run whose job is in Slurm's queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_jobs import job_file, status
from cluster_jobs.executors import executor
from cluster_jobs.executors.slurm import _job_of
from cluster_jobs.slurm import queue
from cluster_jobs.slurm.queue import JobRecord
from deepclust.errors import DataError, ResourceError
from deepclust.launch.start import prepare_run
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from tests.cluster_jobs.slurm.programs import programs
from tests.tiny import deepclust, tiny_recipe


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "reason"),
    [
        ("7|PENDING|Priority|", "7|PENDING||0:0", "PENDING", "others come first"),
        ("7|RUNNING|None|n[1-2]", "7|RUNNING|n[1-2]|0:0", "RUNNING", "on n[1-2]"),
        ("7|COMPLETING|None|n1", "7|CANCELLED by 0|n1|0:15", "STOPPED", "CANCELLED on n1"),
        ("", "7|TIMEOUT|n1|0:0", "STOPPED", "TIMEOUT"),
        ("", "7|FAILED|n1|3:0", "FAILED", "exit code 3"),
        ("", "7|OUT_OF_MEMORY|n1|0:125", "FAILED", "OUT_OF_MEMORY on n1; see"),
        ("", "7|FAILED|n1|75:0", "STOPPED", "deepclust resume"),
        ("7|SUSPENDED|None|n1", "", "RUNNING", "SUSPENDED on n1"),
        ("7|REQUEUE_HOLD|JobHoldMaxRequeue|", "", "PENDING", "JobHoldMaxRequeue"),
        ("", "", "PENDING", "not started yet"),
    ],
)
def test_a_run_without_a_controller_has_the_state_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str, state: str,
    reason: str,
) -> None:  # fmt: skip
    programs(tmp_path, monkeypatch, squeue=f"echo '{squeue}'", sacct=f"echo '{sacct}'")
    prepare_run(tiny_recipe(Path("/shards")), tmp_path / "run")
    job_file.record(tmp_path / "run", on="slurm", job="7")
    now = status.status(Run(tmp_path / "run"))
    assert now.state == state
    assert reason in now.reason


def test_a_slurm_that_does_not_answer_is_an_error_and_an_unknown_job_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = "echo 'Unable to contact slurm controller' >&2; exit 1"
    programs(tmp_path, monkeypatch, squeue=down, sacct=down, scancel=down)
    for ask in (queue.poll, queue.scancel):
        with pytest.raises(ResourceError, match="Unable to contact"):
            ask("7")
    gone = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    programs(tmp_path, monkeypatch, squeue=gone, sacct=":", scancel=gone)
    assert queue.poll("7") is None
    queue.scancel("7")


@pytest.mark.parametrize("job", ["--me", "7 8", "7;x", "", "$(x)", "1" * 40, "７"])
def test_what_is_not_a_job_number_is_never_given_to_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: object
) -> None:
    touch = f"touch {tmp_path}/asked"
    programs(tmp_path, monkeypatch, squeue=touch, sacct=touch, scancel=touch)
    run = tmp_path / "run"
    prepare_run(tiny_recipe(Path("/shards")), run)
    job_file.record(run, on="slurm", job=job)
    slurm = executor("slurm")
    for ask in (slurm.cancel, slurm.is_pending):
        with pytest.raises(DataError, match="not the number of a Slurm job"):
            ask(run)
    assert "not the number" in str(slurm.state(run))
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("job", ["7", "123_4", "123+1", 7])
def test_numbers_of_jobs_arrays_and_parts_are_asked_for(tmp_path: Path, job: object) -> None:
    job_file.record(tmp_path, on="slurm", job=job)
    assert _job_of(tmp_path) == str(job)


def test_where_slurm_does_not_answer_the_files_of_the_run_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path / "run")
    job_file.record(tmp_path / "run", on="slurm", job="7")
    monkeypatch.setenv("PATH", "")
    now = status.status(Run(tmp_path / "run"))
    assert now.state == "PENDING"
    assert "Slurm does not answer" in now.reason


def test_a_run_that_continues_on_this_machine_ignores_the_state_of_its_old_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, squeue=":", sacct="echo '7|CANCELLED|n1|0:15'")
    prepare_run(tiny_recipe(Path("/shards")), tmp_path / "run")
    job_file.record(tmp_path / "run", on="slurm", job="7")
    assert status.status(Run(tmp_path / "run")).state == "STOPPED"
    with hold(tmp_path / "run") as token:
        Run(tmp_path / "run", token).event("started")
        assert status.status(Run(tmp_path / "run")).state == "RUNNING"


def test_a_run_whose_job_waits_is_not_started_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe(Path("/shards")).save(tmp_path / "tiny.yaml")
    run = tmp_path / "run"
    prepare_run(tiny_recipe(Path("/shards")), run)
    job_file.record(run, on="slurm", job="7")
    programs(tmp_path, monkeypatch, squeue="echo '7|PENDING|Priority|'")
    for words in (
        ["resume", run], ["resume", run, "--on", "local"], ["train", run],
        ["submit", tmp_path / "tiny.yaml", "--run", run],
        ["pretrain", tmp_path / "tiny.yaml", "--run", run],
    ):  # fmt: skip
        assert "has a job already" in deepclust(*words, code=7).stderr
    assert job_file.read(run)["job"] == "7"


def test_slurm_is_asked_once_for_all_runs_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / f"run-{number}" for number in range(4)]
    for number, run in enumerate(runs):
        prepare_run(tiny_recipe(Path("/shards")), run)
        job_file.record(run, on="slurm", job=f"7_{number}")
    asked, told = tmp_path / "asked", tmp_path / "told"
    told.write_text("7_0|RUNNING|None|n1\n7_1|PENDING|Priority|\n")
    accounts = "echo '7_2|TIMEOUT|n1|0:0'"
    programs(
        tmp_path, monkeypatch,
        squeue=f'echo "squeue $*" >> {asked}; cat {told}',
        sacct=f'echo "sacct $*" >> {asked}; {accounts}',
    )  # fmt: skip
    found = status.statuses([Run(run) for run in runs])
    assert [one.state for one in found] == ["RUNNING", "PENDING", "STOPPED", "PENDING"]
    assert found[3].reason == "not started yet"
    first, second = asked.read_text().splitlines()
    assert "-j 7_0,7_1,7_2,7_3" in first
    assert "-j 7_2,7_3" in second


def test_a_thousand_jobs_are_one_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, jobs = tmp_path / "asked", [f"7_{number}" for number in range(1_000)]
    waiting = 'for job in $(echo "$4" | tr , " "); do echo "$job|PENDING|Priority|"; done'
    programs(tmp_path, monkeypatch, squeue=f"echo squeue >> {asked}; {waiting}", sacct="exit 1")
    told = queue.poll_all(jobs)
    assert [told[job] for job in jobs] == [JobRecord("PENDING", "Priority")] * 1_000
    assert asked.read_text().split() == ["squeue"]
