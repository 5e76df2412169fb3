"""What Slurm says of a job, in its words: `squeue` while it is known there, `sacct` afterwards.

Slurm forgets a job some minutes after its end (MinJobAge), and not every cluster keeps accounts, so
either may know nothing. Whoever asks adds what the run directory says.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from deepclust.errors import ResourceError

PATIENCE_S = 20.0
GONE = ("Invalid job id", "already completing or completed")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
LIVING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
WHY = {
    "Priority": "others come first", "Resources": "waiting for nodes",
    "BeginTime": "queued again, begins in a moment", "Dependency": "waiting for another job",
    "PartitionNodeLimit": "more nodes than the partition has",
    "PartitionTimeLimit": "more time than the partition gives",
    "ReqNodeNotAvail": "nodes are down or reserved", "BadConstraints": "no node is like that",
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A job's state by Slurm, why it waits, where it runs, and how it ended (exit:signal)."""

    state: str
    reason: str = ""
    nodes: str = ""
    ended: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in WAITING

    @property
    def lives(self) -> bool:
        """Whether it has nodes."""
        return self.state in LIVING

    def __str__(self) -> str:
        told = WHY.get(self.reason, "")
        reason = f" ({self.reason}{': ' if told else ''}{told})" if self.reason else ""
        return f"{self.state}{reason}{f' on {self.nodes}' if self.nodes else ''}"


def look(job: str) -> Seen | None:
    """The job as Slurm sees it now; None when it knows no such job.

    Raises `ResourceError` when Slurm does not answer.
    """
    queued, problem = _ask("squeue", "-h", "-j", job, "-o", "%T|%r|%N")
    if queued:
        state, reason, nodes = queued.splitlines()[0].split("|")
        seen = Seen(state, "" if reason == "None" else reason, nodes)
        if seen.waits or (seen.lives and seen.state != "COMPLETING"):
            return seen
    kept, _ = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList,ExitCode")
    if kept:
        state, nodes, ended = kept.splitlines()[-1].split("|")  # known while it is COMPLETING
        return Seen(state.split()[0], "", "" if nodes == "None assigned" else nodes, ended)
    if problem and not any(words in problem for words in GONE):
        raise ResourceError(f"Slurm does not answer: {problem}")
    return seen if queued else None


def scancel(job: str) -> None:
    """Take the job out of the queue, or end it. Raises `ResourceError` when Slurm does not."""
    _, problem = _ask("scancel", job)
    if problem and not any(words in problem for words in GONE):
        raise ResourceError(f"job {job} could not be cancelled: {problem}")


def _ask(*words: str) -> tuple[str, str]:
    """What a command prints, and what is wrong when it is not there, fails or does not answer."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    problem = done.stderr.strip() or f"{words[0]} ended with exit code {done.returncode}"
    return ("", problem) if done.returncode else (done.stdout.strip(), "")
