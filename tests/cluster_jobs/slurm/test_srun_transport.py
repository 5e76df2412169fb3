"""The socket transport without Slurm: a head, its tasks as threads, and real processes of ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster_jobs.slurm.allocation import Allocation
from cluster_jobs.slurm.layout import Layout, Slot
from cluster_jobs.slurm.rendezvous import hosting, join
from cluster_jobs.slurm.srun_transport import Tasks
from cluster_jobs.slurm.srun_worker import serve
from deepclust.errors import RequeueWanted
from deepclust.launch import local
from deepclust.launch.endings import Ending, Record
from deepclust.launch.policy import Policy
from deepclust.launch.supervisor import Supervisor
from deepclust.run.directory import Run

pytestmark = pytest.mark.new_interpreters  # of a program that is not the worker's

HEAD = Allocation("7", 0, ["n1"], 0, 0, 2, 0)
LAYOUT = Layout([[Slot(0, None), Slot(1, None)]], 2, 1, 1, 2, 0, by_ray=False)
SECONDS = 3  # of the ranks' stage


def never() -> bool:
    return False


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tasks]:
    """Two tasks that have come to a head."""
    monkeypatch.setattr(local, "RANK", "tests.launch.long_stage")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    (tmp_path / "logs").mkdir()

    def task(number: int) -> None:
        line = join(tmp_path, replace(HEAD, task=number), 10)
        assert line is not None
        serve(line, tmp_path)

    threads = [threading.Thread(target=task, args=(number,)) for number in range(2)]
    with hosting(tmp_path, HEAD, "127.0.0.1") as head:
        for thread in threads:
            thread.start()
        tasks = Tasks(LAYOUT, head, 60.0, never)
        tasks.gather(HEAD)
        tasks.run = Run(tmp_path, attempt=SECONDS)
        yield tasks
    for thread in threads:
        thread.join()


def watched(tasks: Tasks, strike: Callable[[Record], object] | None = None) -> Ending:
    """An attempt, in which `strike` is called when rank 1 has begun, with where it is."""

    def show(record: Record) -> None:
        if record.get("rank") == 1 and strike is not None:
            strike(record)

    assert tasks.run is not None
    return Supervisor(tasks.run, Policy(hang=4.0), never, show).watch(tasks, tasks.roles)


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "death"), (signal.SIGSTOP, "hang")])
def test_a_lost_rank_is_named_and_the_same_tasks_make_the_next_attempt(
    tasks: Tasks, number: int, cause: str
) -> None:
    ending = watched(tasks, lambda record: os.kill(record["pid"], number))
    assert (ending.kind, ending.who, ending.cause) == ("fault", "rank 1", cause)
    tasks.check()
    assert watched(tasks) == Ending("finished")


def test_a_lost_task_ends_the_attempt_and_the_job(tasks: Tasks) -> None:
    ending = watched(tasks, lambda _: tasks.peers[1].line.socket.shutdown(socket.SHUT_RDWR))
    assert (ending.who, ending.cause) == ("rank 1", "node")
    with pytest.raises(RequeueWanted, match="rank 1 on n1 was lost"):
        tasks.check()
