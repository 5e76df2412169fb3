"""The parts of a Slurm job that need no Slurm: tasks that meet, words of squeue, decisions."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cluster_jobs import job_file, status
from cluster_jobs.executors.slurm import ENDED
from cluster_jobs.slurm import create, queue, task
from cluster_jobs.slurm.allocation import Allocation, read_allocation
from cluster_jobs.slurm.rendezvous import Line, folder, hosting, join, leave
from cluster_jobs.spec import slurm_spec
from deepclust.errors import RequeueWanted, ResourceError, RunHeldError
from deepclust.launch.ports import free_ports
from deepclust.launch.start import prepare_run
from deepclust.run.directory import Run
from deepclust.run.lock import hold, renew
from tests.tiny import deepclust, tiny_recipe

HEAD = Allocation("7", 0, ["n1", "n2"], 0, 0, 2, 0)
OTHER = Allocation("7", 0, ["n1", "n2"], 1, 1, 2, 0)


def never() -> bool:
    return False


def test_a_guest_that_knows_the_word_is_let_in_and_hears_the_end(tmp_path: Path) -> None:
    lines: list[Line | None] = []
    peer = threading.Thread(target=lambda: lines.append(join(tmp_path, OTHER, 10)))
    with hosting(tmp_path, HEAD, "127.0.0.1") as head:
        peer.start()
        (found,) = head.gather({1: "n2"}, 10, never)
        peer.join()
        assert (found.task, found.node) == (1, "n2")
        found.line.send(hello=1)
        found.line.send(hello=2)
        line = lines[0]
        assert line is not None
        assert [line.first(5), line.first(5)] == [{"hello": 1}, {"hello": 2}]
    assert line.first(5) is None
    assert not line.open
    line.close()


def test_where_the_head_is_only_its_owner_can_read_and_only_while_it_is_there(
    tmp_path: Path,
) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1"):
        for name in ("head.json", "token"):
            mode = (folder(tmp_path, HEAD) / name).stat().st_mode
            assert stat.S_IMODE(mode) == 0o600
    left = {file.name for file in folder(tmp_path, HEAD).iterdir()}
    assert left == {"bring-up.jsonl"}


def test_who_comes_when_the_head_has_been_there_and_is_gone_does_not_wait(tmp_path: Path) -> None:
    leave(tmp_path, HEAD)
    assert join(tmp_path, OTHER, 60) is None


def test_who_does_not_know_the_word_is_not_let_in_and_the_missing_are_named(tmp_path: Path) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1") as head:
        told = json.loads((folder(tmp_path, HEAD) / "head.json").read_text())
        with socket.create_connection((told["address"], told["port"])) as stranger:
            stranger.sendall(b'{"secret": "guess", "task": 1, "node": "n2"}\n')
            with pytest.raises(ResourceError, match="task 1 on n2 did not come within"):
                head.gather({1: "n2"}, 0.5, never)


def test_a_head_that_is_asked_to_stop_waits_for_nobody(tmp_path: Path) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1") as head, pytest.raises(RequeueWanted):
        head.gather({1: "n2"}, 60, lambda: True)


def test_an_older_start_of_the_job_is_not_taken_for_this_one(tmp_path: Path) -> None:
    again = Allocation("7", 1, ["n1", "n2"], 1, 1, 2, 0)
    with (
        hosting(tmp_path, HEAD, "127.0.0.1"),
        pytest.raises(ResourceError, match="n2 found no head"),
    ):
        join(tmp_path, again, 0.3)


def test_outside_of_a_job_there_is_no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPCLUST_NODES", raising=False)
    with pytest.raises(ResourceError, match="start this by srun in a Slurm job"):
        read_allocation()


def test_a_lock_of_an_earlier_start_of_the_same_job_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with hold(tmp_path):
        with pytest.raises(RunHeldError), hold(tmp_path):
            pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with hold(tmp_path):
            monkeypatch.delenv("SLURM_RESTART_COUNT")
            with pytest.raises(RunHeldError), hold(tmp_path):  # the old one does not come back
                pass


def test_a_controller_that_was_taken_over_writes_no_event(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    with hold(tmp_path) as token:
        run = Run(tmp_path, token)
        run.event("started")
        renew(tmp_path, token)
        with pytest.raises(RunHeldError, match="taken over"):
            run.event("stopped")
    assert [event["event"] for event in run.events()] == ["started"]


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Programs of these names on PATH, before all others."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "reason"),
    [
        ("PENDING|Priority|", "PENDING||0:0", "PENDING", "others come first"),
        ("RUNNING|None|n[1-2]", "RUNNING|n[1-2]|0:0", "RUNNING", "on n[1-2]"),
        ("COMPLETING|None|n1", "CANCELLED by 0|n1|0:15", "STOPPED", "CANCELLED on n1"),
        ("", "TIMEOUT|n1|0:0", "STOPPED", "TIMEOUT"),
        ("", "FAILED|n1|3:0", "FAILED", "exit code 3"),
        ("", "OUT_OF_MEMORY|n1|0:125", "FAILED", "OUT_OF_MEMORY on n1; see"),
        ("", "FAILED|n1|75:0", "STOPPED", "deepclust resume"),
        ("SUSPENDED|None|n1", "", "RUNNING", "SUSPENDED on n1"),
        ("REQUEUE_HOLD|JobHoldMaxRequeue|", "", "PENDING", "JobHoldMaxRequeue"),
        ("", "", "PENDING", "not started yet"),
    ],
)
def test_a_run_that_nobody_holds_is_in_the_state_that_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str, state: str,
    reason: str,
) -> None:  # fmt: skip
    programs(tmp_path, monkeypatch, squeue=f"echo '{squeue}'", sacct=f"echo '{sacct}'")
    prepare_run(tiny_recipe(Path("/shards")), tmp_path / "run")
    job_file.record(tmp_path / "run", on="slurm", job="7")
    found = status.status(Run(tmp_path / "run"))
    assert found.state == state
    assert reason in found.reason


def test_a_slurm_that_does_not_answer_is_no_slurm_that_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = "echo 'Unable to contact slurm controller' >&2; exit 1"
    programs(tmp_path, monkeypatch, squeue=down, sacct=down, scancel=down)
    for ask in (queue.look, queue.scancel):
        with pytest.raises(ResourceError, match="Unable to contact"):
            ask("7")
    gone = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    programs(tmp_path, monkeypatch, squeue=gone, sacct=":", scancel=gone)
    assert queue.look("7") is None
    queue.scancel("7")


def test_where_slurm_does_not_answer_the_run_speaks_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path / "run")
    job_file.record(tmp_path / "run", on="slurm", job="7")
    monkeypatch.setenv("PATH", "")
    found = status.status(Run(tmp_path / "run"))
    assert found.state == "PENDING"
    assert "Slurm does not answer" in found.reason


def test_a_run_that_goes_on_here_is_not_in_the_state_of_its_old_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, squeue=":", sacct="echo 'CANCELLED|n1|0:15'")
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
    programs(tmp_path, monkeypatch, squeue="echo 'PENDING|Priority|'")
    for words in (
        ["resume", run], ["resume", run, "--on", "local"], ["train", run],
        ["submit", tmp_path / "tiny.yaml", "--run", run],
        ["pretrain", tmp_path / "tiny.yaml", "--run", run],
    ):  # fmt: skip
        assert "has a job already" in deepclust(*words, code=7).stderr
    assert job_file.read(run)["job"] == "7"


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.0\r\n\r\n", b"1\n", b"[" * 60000 + b"\n", '{"secret": "ä"}\n'.encode()]
)
def test_whatever_a_stranger_says_the_head_goes_on(tmp_path: Path, words: bytes) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1") as head:
        told = json.loads((folder(tmp_path, HEAD) / "head.json").read_text())
        with socket.create_connection((told["address"], told["port"])) as stranger:
            stranger.sendall(words)
            with pytest.raises(ResourceError, match="did not come"):
                head.gather({1: "n2"}, 0.5, never)


def test_a_plain_job_that_is_queued_again_finds_its_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    tiny_recipe(Path("photos")).save(tmp_path / "tiny.yaml")
    words = (str(tmp_path / "tiny.yaml"), tmp_path / "run", ["data.shards=photos"])
    for restart in ("0", "0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        create.create(*words)
    assert Run(tmp_path / "run").recipe.data.shards == str(tmp_path / "photos")
    assert job_file.read(tmp_path / "run")["job"] == "7"


def test_free_ports_are_different_ones_that_can_be_had() -> None:
    ports = free_ports("127.0.0.1", 6)
    assert len(set(ports)) == 6
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_an_error_that_is_none_of_ours_asks_for_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()

    def broken(*_: object) -> None:
        raise RuntimeError("a port was taken")

    monkeypatch.setattr(task, "control_by_ray", broken)
    alone = replace(HEAD, nodes=["n1"])
    spec = slurm_spec(tiny_recipe(Path("/shards")))
    codes = [task.lead(tmp_path, alone, spec, []) for _ in range(4)]
    assert codes == [75, 75, 75, 4]


def test_starts_that_bring_nothing_are_not_repeated_for_ever(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()
    for _ in range(3):
        task.refuse_without_progress(tmp_path, HEAD)
    with pytest.raises(ResourceError, match="3 starts of job 7 in a row made no progress"):
        task.refuse_without_progress(tmp_path, HEAD)
    task.refuse_without_progress(tmp_path, replace(HEAD, job="8"))  # a new job has its own chances


def test_a_start_that_brings_something_or_was_asked_to_stop_is_forgiven(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()
    for number in range(6):
        task.refuse_without_progress(tmp_path, HEAD)
        (tmp_path / "rounds" / "0000" / "raw" / f"unit-{number}").mkdir(parents=True)
    for _ in range(6):
        task.refuse_without_progress(tmp_path, HEAD)
        assert task.after_stop(tmp_path, [signal.SIGTERM, task.LOST]) == 75


def test_a_node_that_leaves_at_every_start_is_not_forgiven_for_ever(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()
    for _ in range(3):
        task.refuse_without_progress(tmp_path, HEAD)
        assert task.after_stop(tmp_path, [task.LOST, signal.SIGTERM]) == 75
    with pytest.raises(ResourceError, match="in a row made no progress"):
        task.refuse_without_progress(tmp_path, HEAD)


def test_word_to_cancel_counts_as_an_interrupt_and_ends_the_job(tmp_path: Path) -> None:
    asked: list[int] = []
    assert not job_file.stopping(tmp_path, asked)
    job_file.ask_to_cancel(tmp_path)
    assert job_file.stopping(tmp_path, asked)
    assert asked == [signal.SIGINT]
    assert task.after_stop(tmp_path, asked) == 130
    assert not job_file.stopping(tmp_path, [])


@pytest.mark.parametrize(
    ("code", "state", "restarts", "then"),
    [
        (75, "RUNNING", 0, "requeue 7"),
        (137, "RUNNING", 0, "requeue 7"),
        (130, "RUNNING", 0, "scancel 7"),
        (0, "RUNNING", 0, ""),
        (3, "RUNNING", 0, ""),
        (75, "COMPLETING", 0, ""),  # scancel, or Slurm itself, was first
        (75, "RUNNING", 1, ""),  # this start is over for Slurm, which has made another
    ],
)
def test_the_job_script_does_what_the_exit_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str, restarts: int, then: str
) -> None:
    programs(
        tmp_path, monkeypatch, squeue=f"echo {state} {restarts}", sleep=":", scontrol='echo "$@"',
        scancel='echo scancel "$@"',
    )  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    text = f"(exit {code})\n{ENDED.format(requeues=5)}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.strip() == then


def test_the_job_script_asks_again_when_slurm_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = f"test -e {tmp_path}/asked && echo RUNNING 0; touch {tmp_path}/asked"
    refuses = f"test -e {tmp_path}/tried && echo again; ! mkdir {tmp_path}/tried"
    programs(tmp_path, monkeypatch, squeue=once, sleep=":", scontrol=refuses)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    text = f"(exit 75)\n{ENDED.format(requeues=5)}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "again"


def test_a_job_is_queued_again_only_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, squeue="echo RUNNING 5", scontrol="echo called", sleep=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    text = f"(exit 75)\n{ENDED.format(requeues=5)}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.stdout == ""
