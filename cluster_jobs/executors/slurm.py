"""The Slurm executor: a run as a job that Slurm starts, preempts and requeues, by submitit.

What is submitted names the run directory and nothing else. So Slurm may start it any number of
times, and every start continues from the last commit. Its program is `cluster_jobs.slurm.task`, one
task for each node or, with `slurm.launcher: srun`, one for each process.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster_jobs import job_file
from cluster_jobs.executors import background
from cluster_jobs.executors.base import Executor, JobState, Sweep, open_to_resume
from cluster_jobs.slurm import queue, script
from cluster_jobs.slurm.script import PROGRAM, Plan
from deepclust.errors import DataError, ResourceError
from deepclust.launch.signals import HELD_BACK
from deepclust.launch.start import prepare_run
from deepclust.recipe import Recipe
from deepclust.run import directory, lock

if TYPE_CHECKING:
    import submitit

PACKAGES = ("deepclust", "cluster_jobs")
JOB = re.compile(r"[0-9]{1,12}(_[0-9]{1,9})?(\+[0-9]{1,9})?")  # an array's task, a part of a job
STOPPED = ("CANCELLED", "TIMEOUT", "PREEMPTED")  # ends that a resume mends
REQUEUE_WANTED = "75:"  # exit code and signal of a job that stopped at a step


@dataclass(frozen=True)
class Entry:
    """What submitit starts in every task: it becomes our program, with the signals blocked.

    Jobs that wait hold it pickled, so its name and its field stay.
    """

    run: str

    def __call__(self) -> None:
        """Become the program of the task, which unblocks the signals when it can handle them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        os.execv(sys.executable, [sys.executable, "-u", "-P", "-m", PROGRAM, self.run])

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what submitit queues when a signal comes before that: the same job."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SlurmExecutor(Executor[Plan]):
    """Runs as jobs of a Slurm cluster."""

    name = "slurm"
    poll_s = 3.0  # Slurm's controller is shared
    asks_together = True

    def prepare(self, recipe: Recipe, run_dir: Path) -> Plan:
        """Return the job for a recipe, without writing or starting anything."""
        return script.prepare(recipe, run_dir)

    def submit(self, plan: Plan) -> None:
        """Create the run and queue its job."""
        _require_slurm()
        prepare_run(plan.recipe, plan.run_dir)
        _queue([plan])

    def prepare_sweep(self, plans: list[Plan], folder: Path) -> script.Sweep:
        """Return one array for the plans, or raise `RecipeError` when their resources differ."""
        return script.prepare_sweep(plans, folder)

    def submit_sweep(self, sweep: Sweep[Plan]) -> None:
        """Create the runs and queue them as one array."""
        _require_slurm()
        for plan in sweep.plans:
            prepare_run(plan.recipe, plan.run_dir)
        _queue(sweep.plans)

    def resume(self, run_dir: Path, overrides: list[str]) -> None:
        """Queue a job for a run that exists, wherever it ran before."""
        _require_slurm()
        run, recipe = open_to_resume(run_dir, overrides)
        plan = self.prepare(recipe, run_dir)
        if plan.recipe != run.recipe:
            with lock.hold(run_dir):
                plan.recipe.save(run_dir / "recipe.yaml")
        _queue([plan])

    def cancel(self, run_dir: Path) -> str:
        """Stop the run at its next step, then take its job out of Slurm."""
        number = _job_of(run_dir)
        if lock.owner(run_dir) is None and not self.is_pending(run_dir):
            return f"{run_dir} is not running"
        job_file.ask_to_cancel(run_dir)
        deadline = time.monotonic() + background.CANCEL_PATIENCE_S
        while lock.owner(run_dir) is not None and time.monotonic() < deadline:
            time.sleep(0.5)
        if number:
            queue.scancel(number)
        if lock.owner(run_dir) is None:
            job_file.forget_cancel(run_dir)
        resume = f"deepclust resume {run_dir} --on slurm"
        return f"{run_dir} was stopped, job {number}; {resume} continues it"

    def is_pending(self, run_dir: Path) -> bool:
        """Return whether its job is queued or has nodes.

        Raises `ResourceError` when Slurm does not answer.
        """
        number = _job_of(run_dir)
        job = queue.poll(number) if number else None
        return job is not None and (job.waits or job.lives)

    def state(self, run_dir: Path) -> JobState | None:
        """Return what Slurm says about the run's job, or None when it knows none."""
        return self.states([run_dir])[run_dir]

    def states(self, run_dirs: Sequence[Path]) -> dict[Path, JobState | None]:
        """Return the same of many runs, for which Slurm is asked once."""
        found: dict[Path, JobState | None] = dict.fromkeys(run_dirs)
        numbers: dict[Path, str] = {}
        for run_dir in run_dirs:
            try:
                if number := _job_of(run_dir):
                    numbers[run_dir] = number
            except DataError as error:
                found[run_dir] = JobState("unknown", str(error))
        answers = queue.poll_all(sorted(set(numbers.values())))
        for run_dir, number in numbers.items():
            found[run_dir] = _state_of(number, answers[number], run_dir)
        return found


EXECUTOR = SlurmExecutor()


def _job_of(run_dir: Path) -> str | None:
    """Return the number of the run's job, if it has one.

    Raises `DataError` for anything else: it would be an option of `scancel`, like `--me`.
    """
    number = job_file.read(run_dir).get("job")
    if number is not None and not JOB.fullmatch(str(number)):
        raise DataError(
            f"{run_dir / 'job.json'} names {str(number)[:50]!r}, which is not the number of a "
            "Slurm job. Delete that file if no job of this run is queued."
        )
    return None if number is None else str(number)


def _state_of(number: str, answer: queue.Answer, run_dir: Path) -> JobState | None:
    if isinstance(answer, ResourceError):
        text = f"job {number}: {str(answer).splitlines()[0]}"
        return JobState("unknown", text, may_answer_later=queue.is_installed())
    return None if answer is None else _job_state(answer, f"job {number}: {answer}", run_dir)


def _job_state(job: queue.JobRecord, text: str, run_dir: Path) -> JobState:
    if job.waits:
        return JobState("waiting", text)
    if job.lives:
        moving = "" if job.state == "SUSPENDED" else ": coming up, or leaving"
        return JobState("running", text + moving)
    if job.ended.startswith(REQUEUE_WANTED) or job.state in STOPPED:
        return JobState("stopped", f"{text}; deepclust resume {run_dir} --on slurm")
    number = job.ended.partition(":")[0]
    code = f", exit code {number}" if number not in ("", "0") else ""
    return JobState("failed", f"{text}{code}; see {job_file.output(run_dir)}")


def _queue(plans: list[Plan]) -> None:
    """Queue one job, or an array when there are several plans."""
    import submitit

    first = plans[0]
    executor = submitit.SlurmExecutor(first.folder, python=f"{shlex.quote(first.python)} -P")
    executor.update_parameters(**first.parameters())
    if first.spec.snapshot:
        _copy_code(first.source)
    facts: dict[str, Any] = {"on": "slurm", "output": str(first.folder)}
    # the time before the job starts: later events of the run are about this job
    facts |= {"git": directory.git_commit(), "time": time.time()}
    for plan in plans:
        job_file.record(plan.run_dir, **facts)
    try:
        with _without_variables_of_a_job(), _for_us_alone(), executor.batch():
            jobs = [executor.submit(Entry(str(plan.run_dir.absolute()))) for plan in plans]
    except submitit.core.utils.FailedJobError as error:
        raise ResourceError(f"Slurm did not take the job: {error}") from error
    for plan, job in zip(plans, jobs, strict=True):
        job_file.record(plan.run_dir, **facts, job=job.job_id)


@contextlib.contextmanager
def _without_variables_of_a_job() -> Iterator[None]:
    """Hide the variables of the job that we are in, since sbatch takes them for options.

    SLURM_CONF says where Slurm is, and stays.
    """
    names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_"))]
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {n: os.environ.pop(n) for n in names if inside and n != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _for_us_alone() -> Iterator[None]:
    """Let nobody else read what submitit writes, or write it.

    Its script has the lines of `slurm.setup`, and its pickle is run on the nodes.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _copy_code(source: Path) -> None:
    """Copy our two packages as they are now."""
    here = Path(directory.__file__).parents[2]
    ignore = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(here / package, source / package, dirs_exist_ok=True, ignore=ignore)


def _require_slurm() -> None:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ResourceError(
            "this machine has no sbatch and srun: submit from a login node of the cluster "
            "(--dry-run works anywhere)"
        )
