"""The faults that a job on Slurm must survive, for tests and for tools/bench/slurm/faults.py.

Each is done to a job that trains. What is needed to let it resume is done too: a preempting job
that ends, a slurmd that comes back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.nodes import events
from tests.jobs.slurm_here import SlurmHere

PATIENCE_S = 240.0
Strike = Callable[[SlurmHere, Path, str], None]


@dataclass(frozen=True)
class Fault:
    """What is done to the job, and what the run needs for it."""

    strike: Strike
    overrides: tuple[str, ...] = ("slurm.nodes=2",)


def until(moment: Callable[[], object], what: str = "the moment") -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


def until_gone(slurm: SlurmHere, number: str) -> None:
    """Wait for the end of every process with that job's number in its environment."""
    until(lambda: not slurm.processes(number), "the end of every process of the job")


def starts(run: Path, number: str) -> int:
    """How often the job has been started."""
    return len(list((run / "slurm").glob(f"{number}-[0-9]*")))


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
    """Nothing: the time limit comes by itself."""
    until(lambda: events(run, "stopped"), "the time limit")


def kill_head(slurm: SlurmHere, run: Path, number: str) -> None:
    """Kill -9 of task 0, which controls the run."""
    os.kill(events(run, "started")[-1]["pid"], signal.SIGKILL)


def slurmd_alone(slurm: SlurmHere, run: Path, number: str) -> None:
    """A node that Slurm has lost, where the job's processes live on and write."""
    slurm.kill_node("n1", tree=False)
    until(lambda: starts(run, number) > 1, "a start on the other node")
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
    "preempted": Fault(preempt, ("slurm.nodes=2", "slurm.exclusive=true")),
    "time limit": Fault(limit, ("slurm.nodes=2", "slurm.time=1m", "slurm.signal=25")),
    "kill -9 of the head": Fault(kill_head),
    "slurmd alone": Fault(slurmd_alone, ("slurm.nodes=1",)),
    "slurmd of one of two nodes": Fault(slurmd_of_a_part),
    "slurmd and its tree": Fault(node),
}
