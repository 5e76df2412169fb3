"""The Slurm executor: a run as a job that Slurm starts, preempts and queues again, by submitit.

What is submitted names the run directory and nothing else, so it may be started any number of
times: every start continues from the last commit. Its program is `cluster_jobs.slurm.task`, one
task a node (or, with `slurm.launcher: srun`, one a process).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster_jobs import job_file
from cluster_jobs.executors import background
from cluster_jobs.slurm import queue
from cluster_jobs.slurm.layout import Layout, layout
from cluster_jobs.spec import SlurmSpec, minutes, one_line, slurm_spec
from deepclust.errors import RecipeError, ResourceError
from deepclust.launch.signals import HELD_BACK
from deepclust.launch.start import check_changes, prepare_run
from deepclust.recipe import Recipe
from deepclust.run import directory, lock

if TYPE_CHECKING:
    import submitit

PROGRAM = "cluster_jobs.slurm.task"
UNASKED: dict[str, Any] = {"time": None, "wckey": None}  # submitit has 5 minutes, and a key
PACKAGES = ("deepclust", "cluster_jobs")
BEGAN = "export DEEPCLUST_BEGAN=$(date +%s.%N)"
NODES = 'export DEEPCLUST_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\\n" " ")'
# of the job script, after srun: what becomes of the job, if nobody else has decided that; Slurm is
# asked again when it does not answer
ENDED = """\
code=$?  # the worst of all tasks; 75: stopped at a step, 130: cancelled, above 128: killed
this=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
this=${{this:-$SLURM_JOB_ID}} restart=${{SLURM_RESTART_COUNT:-0}}
case $code in
  130) ending="scancel" ;;
  75|129|13[1-9]|1[4-9]?|2??) ending="scontrol requeue" ;;
  *) ending= ;;
esac
[ "$ending" != "scontrol requeue" ] || [ "$restart" -lt {requeues} ] || ending=
for pause in 10 20 40 80 0; do
  [ -n "$ending" ] || break
  seen=$(squeue -h -j "$this" -O State:20,RestartCnt:20 | xargs)
  if [ "$seen" = "RUNNING $restart" ]; then
    $ending "$this" && sleep 90 && break
  elif [ -n "$seen" ]; then
    break
  fi
  sleep "$pause"
done
exit "$code"
"""


@dataclass(frozen=True)
class Entry:
    """What submitit starts on every node: our program in its place, with its signals held back."""

    run: str

    def __call__(self) -> None:
        """Become the program of the task; it lets the signals in when it can handle them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        os.execv(sys.executable, [sys.executable, "-u", "-P", "-m", PROGRAM, self.run])

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """When a signal comes before that: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class Plan:
    """What would be submitted; printing it is a dry run."""

    recipe: Recipe
    run: Path
    layout: Layout
    sweep: Path | None = None  # the folder of the runs that one array has

    @property
    def spec(self) -> SlurmSpec:
        """The `slurm` section, checked."""
        return slurm_spec(self.recipe)

    @property
    def folder(self) -> Path:
        """Where scripts and output of its jobs lie."""
        return (self.sweep or self.run).absolute() / "slurm"

    @property
    def source(self) -> Path:
        """Where the next snapshot of the code goes; those of jobs that wait are left alone."""
        there = [int(path.name.partition("-")[2]) for path in self.folder.glob("source-*")]
        return self.folder / f"source-{max(there, default=-1) + 1}"

    @property
    def python(self) -> str:
        """On the nodes."""
        return self.spec.python or sys.executable

    @property
    def tasks(self) -> int:
        """Of a node: Ray's one, or one a process."""
        return 1 if self.spec.launcher == "ray" else self.layout.tasks

    @property
    def task_cpus(self) -> int:
        """CPUs of a task; its step has those of all together (`--cpu-bind=none`)."""
        share = self.layout.cpus / self.tasks
        return max(1, ceil(share) if self.spec.cpus_per_node is None else floor(share))

    def parameters(self) -> dict[str, Any]:
        """For submitit."""
        spec = self.spec
        count = spec.gpus or spec.gpus_per_node
        gpus = f"{spec.gpu_type}:{count}" if spec.gpu_type else count
        total = {"gpus": gpus} if spec.gpus else {}
        again = "requeue" if spec.requeues else "no-requeue"
        wanted = {
            "job_name": self.folder.parent.name, "nodes": spec.nodes, "mem": spec.mem,
            "ntasks_per_node": self.tasks, "cpus_per_task": self.task_cpus,
            "gpus_per_node": gpus if spec.gpus_per_node and "gres" not in spec.sbatch else None,
            "time": None if spec.time is None else minutes(spec.time),
            "partition": spec.partition, "qos": spec.qos, "account": spec.account,
            "constraint": spec.constraint, "exclusive": spec.exclusive or None,
            "additional_parameters": {**_options(spec), **total, again: True},
            "setup": self.setup(), "teardown": self.teardown(), "srun_args": self.srun(),
            "stderr_to_stdout": True, "signal_delay_s": spec.signal,
        }  # fmt: skip
        given = {name: value for name, value in wanted.items() if value is not None}
        return {**UNASKED, **given}

    def script(self, runs: int = 1) -> str:
        """The text that sbatch gets, for an array if there are several runs."""
        from submitit.slurm.slurm import _make_sbatch_string

        words = [self.python, "-P", "-u", "-m", "submitit.core._submit", str(self.folder)]
        given = {**self.parameters(), **({"map_count": runs} if runs > 1 else {})}
        return _make_sbatch_string(shlex.join(words), self.folder, **given)

    def setup(self) -> list[str]:
        """Lines before srun."""
        source = shlex.quote(str(self.source))
        pinned = [f'export PYTHONPATH={source}"${{PYTHONPATH:+:$PYTHONPATH}}"']
        own = [*self.spec.setup, "set +e"]  # what follows srun must run
        return [BEGAN, *own, *(pinned if self.spec.snapshot else []), NODES]

    def teardown(self) -> list[str]:
        """Lines after srun."""
        return ENDED.format(requeues=self.spec.requeues).splitlines()

    def srun(self) -> list[str]:
        """CPUs, which srun does not take from sbatch (22.05), and that task 0 ends the others.

        The rest is said lest the submitter's environment says otherwise.
        """
        return [
            f"--cpus-per-task={self.task_cpus}", "--cpu-bind=none", "--distribution=block",
            "--export=ALL", "--kill-on-bad-exit=0", "--wait=0", *self._container(),
        ]  # fmt: skip

    def _container(self) -> list[str]:
        spec, own = self.spec, str(self.folder.parent)
        if not spec.container_image:
            return []
        mounts = ",".join([*spec.container_mounts, f"{own}:{own}"])
        pinned = ["--container-env=PYTHONPATH"] if spec.snapshot else []  # over the image's own
        return [
            f"--container-image={spec.container_image}",
            f"--container-mounts={mounts}",
            *pinned,
        ]

    def __str__(self) -> str:
        return f"{self.layout}\n\n{self.script()}\n{self.recipe.dump()}"


@dataclass(frozen=True)
class Sweep:
    """Runs that one array has; they differ in nothing but the run."""

    plans: list[Plan]

    def __str__(self) -> str:
        first, runs = self.plans[0], "\n".join(f"# {plan.run}" for plan in self.plans)
        recipes = "\n".join(f"# {plan.run}\n{plan.recipe.dump()}" for plan in self.plans)
        return f"{runs}\n{first.layout}\n\n{first.script(len(self.plans))}\n{recipes}"


def prepare(recipe: Recipe, run: Path) -> Plan:
    """The job for a recipe; nothing is written or started."""
    spec, found = slurm_spec(recipe), layout(recipe)
    path = str(run.absolute())
    try:
        one_line(path)
    except ValueError as error:
        raise RecipeError(f"--run: {error}") from None
    if "%" in path or "\\" in path:
        raise RecipeError(f"--run {path}: Slurm gives % and \\ in a path a meaning of its own")
    if spec.container_image and set(",:") & set(path):
        raise RecipeError(f"--run {path}: a container's mounts give , and : a meaning of their own")
    threads = recipe.train.threads or max(1, found.rank_cpus - recipe.data.workers)
    overrides = [f"train.ranks={found.ranks}", f"train.threads={threads}"]
    if spec.launcher == "ray":
        overrides += [f"ray.cpus={found.rank_cpus}", f"ray.worker_cpus={found.worker_cpus}"]
    return Plan(recipe.replace(*overrides), run, found)


def submit(plan: Plan) -> None:
    """Create the run and queue its job."""
    _need_slurm()
    prepare_run(plan.recipe, plan.run)
    _queue([plan])


def prepare_sweep(plans: list[Plan], folder: Path) -> Sweep:
    """One array for the plans. Raises `RecipeError` when it cannot have them all."""
    plans = [replace(plan, sweep=folder) for plan in plans]
    for plan in plans[1:]:
        if plan.parameters() != plans[0].parameters():
            raise RecipeError(
                f"{plan.run.name} needs other resources than {plans[0].run.name}, and one array "
                "has the same for all: submit them apart, or set slurm.* so that they are equal"
            )
    return Sweep(plans)


def submit_sweep(sweep: Sweep) -> None:
    """Create the runs and queue them."""
    _need_slurm()
    for plan in sweep.plans:
        prepare_run(plan.recipe, plan.run)
    _queue(sweep.plans)


def resume(run: Path, overrides: list[str]) -> None:
    """Queue a job for a run that exists, wherever it ran before."""
    _need_slurm()
    found = directory.open_run(run)
    recipe = found.recipe.replace(*overrides)
    check_changes(found, recipe)
    background.refuse_held(run)
    plan = prepare(recipe, run)
    if plan.recipe != found.recipe:
        with lock.hold(run):
            plan.recipe.save(run / "recipe.yaml")
    _queue([plan])


def is_pending(run: Path) -> bool:
    """Whether its job is in the queue, or has nodes."""
    seen = _seen(run)
    return seen is not None and (seen.waits or seen.lives)


def cancel(run: Path) -> str:
    """Stop it at the next step where it runs, then take its job out of Slurm."""
    number = job_file.read(run).get("job")
    if lock.owner(run) is None and not is_pending(run):
        return f"{run} is not running"
    job_file.ask_to_cancel(run)
    deadline = time.monotonic() + background.CANCEL_PATIENCE_S
    while lock.owner(run) is not None and time.monotonic() < deadline:
        time.sleep(0.5)
    if number:
        queue.scancel(str(number))
    if lock.owner(run) is None:
        job_file.forget_cancel(run)
    return f"{run} was stopped, job {number}; deepclust resume {run} --on slurm continues it"


def _queue(plans: list[Plan]) -> None:
    """One job, or an array of as many as there are plans; they differ in nothing but the run."""
    import submitit

    first = plans[0]
    executor = submitit.SlurmExecutor(first.folder, python=f"{shlex.quote(first.python)} -P")
    executor.update_parameters(**first.parameters())
    if first.spec.snapshot:
        _snapshot(first.source)
    facts: dict[str, Any] = {"on": "slurm", "output": str(first.folder)}
    # of before it starts: what the run says later is about this job
    facts |= {"git": directory.git_commit(), "time": time.time()}
    for plan in plans:
        job_file.record(plan.run, **facts)
    try:
        with _outside_of_a_job(), executor.batch():
            jobs = [executor.submit(Entry(str(plan.run.absolute()))) for plan in plans]
    except submitit.core.utils.FailedJobError as error:
        raise ResourceError(f"Slurm did not take the job: {error}") from error
    for plan, queued in zip(plans, jobs, strict=True):
        job_file.record(plan.run, **facts, job=queued.job_id)


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Inside of another job its variables would win; SLURM_CONF says where Slurm is, and stays."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_"))]
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {n: os.environ.pop(n) for n in names if inside and n != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _snapshot(source: Path) -> None:
    """A copy of our two packages as they are now."""
    here = Path(directory.__file__).parent.parent
    for package in PACKAGES:
        shutil.copytree(
            here / package, source / package, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip


def _seen(run: Path) -> queue.Seen | None:
    number = job_file.read(run).get("job")
    return queue.look(str(number)) if number else None


def _options(spec: SlurmSpec) -> dict[str, str | int | bool]:
    return {name: value for name, value in spec.sbatch.items() if value is not False}


def _need_slurm() -> None:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ResourceError(
            "no sbatch and srun here: submit from a login node of the cluster (--dry-run works "
            "anywhere)"
        )
