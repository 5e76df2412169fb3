"""The state of a job by Slurm: `squeue` while it is known there, `sacct` afterwards.

Slurm forgets a job some minutes after its end (MinJobAge), and not every cluster keeps accounts, so
both may know nothing. The caller then has the files of the run directory.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deepclust.errors import ResourceError

PATIENCE_S = 20.0
AT_ONCE = 5_000  # jobs that a command is asked for: 100 kB of a word, which may have 128
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


Answer: TypeAlias = JobRecord | ResourceError | None


def is_installed() -> bool:
    """Return whether this machine can ask a Slurm at all."""
    return shutil.which("squeue") is not None


def poll(job: str) -> JobRecord | None:
    """Return the job as Slurm reports it now, or None when Slurm does not know it.

    Raises `ResourceError` when Slurm does not answer.
    """
    answer = poll_all([job])[job]
    if isinstance(answer, ResourceError):
        raise answer
    return answer


def poll_all(jobs: Sequence[str]) -> dict[str, Answer]:
    """Return what Slurm says of each job, by two commands for up to 5,000 of them.

    An error stands for a job that Slurm does not answer for, None for one that it does not know.
    """
    answers: dict[str, Answer] = {}
    for start in range(0, len(jobs), AT_ONCE):
        answers |= _polled(jobs[start : start + AT_ONCE])
    return answers


def _polled(jobs: Sequence[str]) -> dict[str, Answer]:
    words = ("squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i|%T|%r|%N")
    queued, problem = _run(*words)
    records: dict[str, Answer] = {}
    for line in queued.splitlines():
        job, state, reason, nodes = line.split("|")
        records[job] = JobRecord(state, "" if reason == "None" else reason, nodes)
    # the accounts have the exit code while squeue still says COMPLETING
    if rest := [job for job in jobs if not _is_in_queue(records.get(job))]:
        records |= _from_accounts(rest)
    if problem and not any(words in problem for words in GONE):
        error = ResourceError(f"Slurm does not answer: {problem}")
        return {job: records.get(job, error) for job in jobs}
    return {job: records.get(job) for job in jobs}


def _is_in_queue(answer: Answer) -> bool:
    if not isinstance(answer, JobRecord):
        return False
    return answer.waits or (answer.lives and answer.state != "COMPLETING")


def _from_accounts(jobs: Sequence[str]) -> dict[str, JobRecord]:
    """Return how the accounts know these jobs; of one that was queued again the last start."""
    words = ("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State,NodeList,ExitCode")
    kept, _ = _run(*words)
    records = {}
    for line in kept.splitlines():
        job, state, nodes, ended = line.split("|")
        nodes = "" if nodes == "None assigned" else nodes
        records[job] = JobRecord(state.split()[0], "", nodes, ended)
    return records


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
