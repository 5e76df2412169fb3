"""The parts of a Slurm job that need no Slurm: tasks that find each other, and decisions."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cluster_jobs import job_file
from cluster_jobs.slurm import create, task
from cluster_jobs.slurm.allocation import Allocation, read_allocation
from cluster_jobs.slurm.rendezvous import Line, folder, hosting, join, leave
from cluster_jobs.slurm.spec import slurm_spec
from deepclust.errors import RequeueWanted, ResourceError
from deepclust.launch.ports import free_ports
from deepclust.launch.start import prepare_run
from deepclust.run.directory import Run
from tests.tiny import tiny_recipe

HEAD = Allocation("7", 0, ["n1", "n2"], 0, 0, 2, 0)
OTHER = Allocation("7", 0, ["n1", "n2"], 1, 1, 2, 0)


def never() -> bool:
    return False


def test_a_peer_with_the_secret_is_accepted_and_notices_when_the_head_closes(
    tmp_path: Path,
) -> None:
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


def test_the_heads_address_is_readable_by_its_owner_only_and_removed_at_the_end(
    tmp_path: Path,
) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1"):
        for name in ("head.json", "token"):
            mode = (folder(tmp_path, HEAD) / name).stat().st_mode
            assert stat.S_IMODE(mode) == 0o600
    left = {file.name for file in folder(tmp_path, HEAD).iterdir()}
    assert left == {"bring-up.jsonl"}


def test_joining_after_the_head_has_left_returns_at_once(tmp_path: Path) -> None:
    leave(tmp_path, HEAD)
    assert join(tmp_path, OTHER, 60) is None


def test_a_peer_without_the_secret_is_refused_and_the_missing_tasks_are_named(
    tmp_path: Path,
) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1") as head:
        address = json.loads((folder(tmp_path, HEAD) / "head.json").read_text())
        with socket.create_connection((address["address"], address["port"])) as connection:
            connection.sendall(b'{"secret": "guess", "task": 1, "node": "n2"}\n')
            with pytest.raises(ResourceError, match="task 1 on n2 did not connect within"):
                head.gather({1: "n2"}, 0.5, never)


def test_a_head_that_is_asked_to_stop_does_not_wait_for_its_peers(tmp_path: Path) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1") as head, pytest.raises(RequeueWanted):
        head.gather({1: "n2"}, 60, lambda: True)


def test_the_head_of_an_older_start_of_the_job_is_ignored(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "message",
    [b"GET / HTTP/1.0\r\n\r\n", b"1\n", b"[" * 60000 + b"\n", '{"secret": "ä"}\n'.encode()],
)
def test_a_malformed_message_does_not_stop_the_head(tmp_path: Path, message: bytes) -> None:
    with hosting(tmp_path, HEAD, "127.0.0.1") as head:
        address = json.loads((folder(tmp_path, HEAD) / "head.json").read_text())
        with socket.create_connection((address["address"], address["port"])) as connection:
            connection.sendall(message)
            with pytest.raises(ResourceError, match="did not connect"):
                head.gather({1: "n2"}, 0.5, never)


def test_a_plain_job_that_is_queued_again_leaves_its_run_unchanged(
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


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = free_ports("127.0.0.1", 6)
    assert len(set(ports)) == 6
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_an_unexpected_error_requeues_the_job_until_the_limit(
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


def test_after_three_starts_without_progress_the_job_ends(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()
    for _ in range(3):
        task.refuse_without_progress(tmp_path, HEAD)
    with pytest.raises(ResourceError, match="3 starts of job 7 in a row made no progress"):
        task.refuse_without_progress(tmp_path, HEAD)
    task.refuse_without_progress(tmp_path, replace(HEAD, job="8"))  # a new job has its own chances


def test_a_start_that_made_progress_or_was_asked_to_stop_does_not_count(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()
    for number in range(6):
        task.refuse_without_progress(tmp_path, HEAD)
        (tmp_path / "rounds" / "0000" / "raw" / f"unit-{number}").mkdir(parents=True)
    for _ in range(6):
        task.refuse_without_progress(tmp_path, HEAD)
        assert task.after_stop(tmp_path, [signal.SIGTERM, task.LOST]) == 75


def test_a_node_that_is_lost_at_every_start_ends_the_job(tmp_path: Path) -> None:
    prepare_run(tiny_recipe(Path("/shards")), tmp_path)
    (tmp_path / "slurm").mkdir()
    for _ in range(3):
        task.refuse_without_progress(tmp_path, HEAD)
        assert task.after_stop(tmp_path, [task.LOST, signal.SIGTERM]) == 75
    with pytest.raises(ResourceError, match="in a row made no progress"):
        task.refuse_without_progress(tmp_path, HEAD)


def test_a_request_to_cancel_counts_as_an_interrupt_and_ends_the_job(tmp_path: Path) -> None:
    asked: list[int] = []
    assert not job_file.stopping(tmp_path, asked)
    job_file.ask_to_cancel(tmp_path)
    assert job_file.stopping(tmp_path, asked)
    assert asked == [signal.SIGINT]
    assert task.after_stop(tmp_path, asked) == 130
    assert not job_file.stopping(tmp_path, [])


def test_a_task_imports_no_ray_before_it_has_chosen_its_token() -> None:
    program = "import sys, cluster_jobs.slurm.task; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
