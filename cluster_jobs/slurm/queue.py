"""The state of a job by Slurm: `squeue` while it is known there, `sacct` afterwards.

Slurm forgets a job some minutes after its end (MinJobAge), and not every cluster keeps accounts, so
both may know nothing. The caller then has the files of the run directory.
"""

from __future__ import annotations

import shutil
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
    "ReqNodeNotAvail": "nodes are down or reserved", "BadConstraints": "no node fits the job",
}  # fmt: skip


@dataclass(frozen=True)
class JobRecord:
    """A job's state by Slurm, why it waits, where it runs, and how it ended (exit:signal)."""

    state: str
    reason: str = ""
    nodes: str = ""
    ended: str = ""

    @property
    def waits(self) -> bool:
        """Whether the job is in the queue."""
        return self.state in WAITING

    @property
    def lives(self) -> bool:
        """Whether the job has nodes."""
        return self.state in LIVING

    def __str__(self) -> str:
        meaning = WHY.get(self.reason, "")
        reason = f" ({self.reason}{': ' if meaning else ''}{meaning})" if self.reason else ""
        return f"{self.state}{reason}{f' on {self.nodes}' if self.nodes else ''}"


def is_installed() -> bool:
    """Return whether this machine can ask a Slurm at all."""
    return shutil.which("squeue") is not None


def poll(job: str) -> JobRecord | None:
    """Return the job as Slurm reports it now, or None when Slurm does not know it.

    Raises `ResourceError` when Slurm does not answer.
    """
    queued, problem = _run("squeue", "-h", "-j", job, "-o", "%T|%r|%N")
    if queued:
        state, reason, nodes = queued.splitlines()[0].split("|")
        record = JobRecord(state, "" if reason == "None" else reason, nodes)
        if record.waits or (record.lives and record.state != "COMPLETING"):
            return record
    kept, _ = _run("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList,ExitCode")
    if kept:  # the accounts have the exit code while squeue still says COMPLETING
        state, nodes, ended = kept.splitlines()[-1].split("|")
        nodes = "" if nodes == "None assigned" else nodes
        return JobRecord(state.split()[0], "", nodes, ended)
    if problem and not any(words in problem for words in GONE):
        raise ResourceError(f"Slurm does not answer: {problem}")
    return record if queued else None


def scancel(job: str) -> None:
    """Remove the job from the queue, or end it.

    A `ResourceError` says that Slurm did not.
    """
    _, problem = _run("scancel", job)
    if problem and not any(words in problem for words in GONE):
        raise ResourceError(f"job {job} could not be cancelled: {problem}")


def _run(*words: str) -> tuple[str, str]:
    """Return a command's output, and the problem when it is missing, fails or does not answer."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    problem = done.stderr.strip() or f"{words[0]} ended with exit code {done.returncode}"
    return ("", problem) if done.returncode else (done.stdout.strip(), "")
