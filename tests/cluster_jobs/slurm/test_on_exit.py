"""The end of the job script, slurm/on_exit.sh, run by bash with programs that play Slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cluster_jobs.slurm.script import ON_EXIT
from tests.cluster_jobs.slurm.programs import programs

RUNNING = "echo RUNNING 0"


def end_job(monkeypatch: pytest.MonkeyPatch, code: int, **variables: str) -> tuple[int, str]:
    """Let the script follow a command with that exit code; its exit code and what it called."""
    given = {"SLURM_JOB_ID": "7", "DEEPCLUST_REQUEUES": "5", **variables}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    text = f"set -u\n(exit {code})\n{ON_EXIT.read_text()}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "state", "call"),
    [
        (75, "RUNNING 0", "scontrol requeue 7"),
        (137, "RUNNING 0", "scontrol requeue 7"),
        (143, "RUNNING 0", "scontrol requeue 7"),
        (130, "RUNNING 0", "scancel 7"),
        (0, "RUNNING 0", ""),
        (3, "RUNNING 0", ""),
        (75, "COMPLETING 0", ""),  # scancel, or Slurm itself, was first
        (75, "RUNNING 1", ""),  # Slurm has restarted the job already
    ],
)
def test_the_exit_code_decides_what_becomes_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str, call: str
) -> None:
    calls = {name: f'echo {name} "$@"' for name in ("scontrol", "scancel")}
    programs(tmp_path, monkeypatch, squeue=f"echo {state}", sleep=":", **calls)
    assert end_job(monkeypatch, code) == (code, call)


def test_a_job_of_an_array_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, squeue=RUNNING, sleep=":", scontrol='echo "$@"')
    array = {"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "2"}
    assert end_job(monkeypatch, 75, **array) == (75, "requeue 4_2")


def test_slurm_is_asked_again_when_it_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = f"test -e {tmp_path}/asked && echo RUNNING 0; touch {tmp_path}/asked"
    refuses = f"test -e {tmp_path}/tried && echo again; ! mkdir {tmp_path}/tried 2>/dev/null"
    programs(tmp_path, monkeypatch, squeue=once, sleep=":", scontrol=refuses)
    assert end_job(monkeypatch, 75) == (75, "again")


def test_a_job_is_not_requeued_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, squeue="echo RUNNING 5", scontrol="echo called", sleep=":")
    assert end_job(monkeypatch, 75, SLURM_RESTART_COUNT="5") == (75, "")
