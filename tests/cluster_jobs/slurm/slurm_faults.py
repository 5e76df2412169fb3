"""The faults that a job on Slurm must survive, for tests and for tools/bench/slurm/faults.py.

Each is done to a job that trains. What is needed to let it resume is done too: a preempting job
that ends, a slurmd that comes back.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster_jobs import status
from cluster_jobs.ray.folders import TEMPORARY
from cluster_jobs.slurm import queue
from deepclust.run.directory import Run
from tests.cluster_jobs.ray.nodes import events
from tests.cluster_jobs.slurm.slurm_here import SlurmHere

PATIENCE_S = 240.0
AGREE_S = 10.0
LONG = 90  # epochs, each a round of a second or two, until Slurm misses a node
Strike = Callable[[SlurmHere, Path, str], None]


@dataclass(frozen=True)
class Fault:
    """What is done to the job, and what the run needs for it."""

    strike: Strike
    overrides: tuple[str, ...] = ("slurm.nodes=2",)
    launchers: tuple[str, ...] = ("ray", "srun")
    epochs: int = 12  # that it may strike before the end


def until(moment: Callable[[], object], what: str = "the moment") -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


def until_gone(slurm: SlurmHere, number: str) -> None:
    """Wait for the end of every process with that job's number in its environment."""
    until(lambda: not slurm.processes(number), "the end of every process of the job")


def job_folders() -> set[Path]:
    """Of jobs on this machine; a killed job of any earlier Slurm may have left one."""
    return set(TEMPORARY.glob("dc-job-*"))


def starts(run: Path, number: str) -> int:
    """How often the job has been started."""
    return len(list((run / "slurm").glob(f"{number}-[0-9]*")))


WAITING, RUNNING, DONE, ENDED, FAILED = "waiting", "running", "done", "ended", "failed"
OURS = {
    "PENDING": WAITING, "REQUEUED": WAITING, "RUNNING": RUNNING, "RECOVERING": RUNNING,
    "SUCCEEDED": DONE, "STOPPED": ENDED, "CANCELLED": ENDED, "FAILED": FAILED, "DIED": FAILED,
}  # fmt: skip
ENDS = {
    "COMPLETED": DONE,
    "CANCELLED": ENDED,
    "TIMEOUT": ENDED,
    "PREEMPTED": ENDED,
    "DEADLINE": ENDED,
}


@contextmanager
def watched(slurm: SlurmHere, run: Path, number: str) -> Iterator[list[str]]:
    """While the block lasts, what Slurm and our status say differently for more than 10 s."""
    wrong: list[str] = []
    over = threading.Event()

    def watch() -> None:
        since = time.monotonic()
        while not over.wait(0.5):
            slurms, ours = slurm.now(number), status.status(Run(run)).state
            if class_of(slurms) == OURS[ours]:
                since = time.monotonic()
            elif time.monotonic() - since > AGREE_S:
                wrong.append(f"Slurm says {slurms}, status says {ours}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield wrong
    finally:
        over.set()
        watcher.join()


def class_of(state: str) -> str:
    """Of a state by Slurm, which is empty while the accounts do not have the job yet."""
    if not state or state in queue.WAITING:
        return WAITING
    return RUNNING if state in queue.LIVING else ENDS.get(state, FAILED)


def usr2(slurm: SlurmHere, run: Path, number: str) -> None:
    """The signal that Slurm sends before a time limit and a preemption."""
    slurm.call("scancel", "--signal=USR2", number)


def term(slurm: SlurmHere, run: Path, number: str) -> None:
    """All that a preemption sends where the admin has not asked for more."""
    slurm.call("scancel", "--signal=TERM", number)


def preempt(slurm: SlurmHere, run: Path, number: str) -> None:
    """A job of a higher partition that wants all nodes."""
    words = ("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
    other = slurm.call("sbatch", "--parsable", *words).strip()
    assert slurm.wait(other) == "COMPLETED"


def limit(slurm: SlurmHere, run: Path, number: str) -> None:
    """A time limit that is near. It counts in minutes, and is looked at twice in each."""
    minutes = int(slurm.call("squeue", "-h", "-j", number, "-o", "%M").split(":")[-2])
    slurm.call("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes + 2}")
    until(lambda: events(run, "stopped"), "the time limit")
    slurm.call("scontrol", "update", f"JobId={number}", "TimeLimit=30")


def kill_head(slurm: SlurmHere, run: Path, number: str) -> None:
    """Kill -9 of task 0, which controls the run."""
    os.kill(events(run, "started")[-1]["pid"], signal.SIGKILL)


def kill_gcs(slurm: SlurmHere, run: Path, number: str) -> None:
    """Kill -9 of what makes a node the head of a Ray."""
    (pid,) = [pid for pid in slurm.processes(number) if title(pid).endswith("gcs_server")]
    os.kill(pid, signal.SIGKILL)


def title(pid: int) -> str:
    """The program that a process runs."""
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").partition("\0")[0]


def slurmd_alone(slurm: SlurmHere, run: Path, number: str) -> None:
    """A node that Slurm has lost, where the job's processes live on and write.

    They sleep until the other node has the job, so that they have not finished by then.
    """
    left = [member["pid"] for member in events(run, "placed")[-1]["members"]]
    slurm.kill_node("n1", tree=False)
    for pid in left:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: starts(run, number) > 1, "a start on the other node")
    for pid in left:
        os.kill(pid, signal.SIGCONT)
    slurm.start_node("n1")


def slurmd_of_a_part(slurm: SlurmHere, run: Path, number: str) -> None:
    """The same for one of two nodes."""
    slurm.kill_node("n2", tree=False)
    until(lambda: slurm.state(number) in ("PENDING", "REQUEUED"), "the end of the first start")
    slurm.start_node("n2")


def node(slurm: SlurmHere, run: Path, number: str) -> None:
    """A node that is gone with all that it runs, until it comes back."""
    slurm.kill_node("n2", tree=True)
    until(lambda: slurm.state(number) in ("PENDING", "REQUEUED"), "the end of the first start")
    slurm.start_node("n2")


FAULTS = {
    "USR2": Fault(usr2),
    "TERM": Fault(term),
    "preempted": Fault(preempt, ("slurm.nodes=2", "slurm.exclusive=true"), epochs=20),
    "time limit": Fault(limit, ("slurm.nodes=2", "slurm.time=30m", "slurm.signal=120"), epochs=45),
    "kill -9 of the head": Fault(kill_head),
    "kill -9 of Ray's head": Fault(kill_gcs, launchers=("ray",)),
    "slurmd alone": Fault(slurmd_alone, ("slurm.nodes=1",)),
    "slurmd of one of two nodes": Fault(slurmd_of_a_part, epochs=LONG),
    "slurmd and its tree": Fault(node),
}
