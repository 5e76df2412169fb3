"""The sbatch script of a run on Slurm, and all that is known before it is submitted.

`prepare` is pure: it turns a recipe into a `Plan`, whose text is the dry run and whose parameters
go to submitit. The end of the script, which decides about a requeue, is `on_exit.sh`.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from math import ceil, floor
from pathlib import Path
from typing import Any

from cluster_jobs.slurm.layout import Layout, layout
from cluster_jobs.slurm.spec import SlurmSpec, minutes, one_line, slurm_spec
from deepclust.errors import RecipeError, command, redact
from deepclust.launch.start import with_readers
from deepclust.recipe import Recipe

PROGRAM = "cluster_jobs.slurm.task"
ON_EXIT = Path(__file__).with_name("on_exit.sh")
SUBMITIT_DEFAULTS: dict[str, Any] = {"time": None, "wckey": None}  # else 5 minutes, and a key
# The job in the terms of `deepclust.run.lock`, the nodes by Slurm's names, and when it began.
ENVIRONMENT = (
    "export DEEPCLUST_BEGAN=$(date +%s.%N)",
    "export DEEPCLUST_JOB=$SLURM_JOB_ID DEEPCLUST_RESTART=${SLURM_RESTART_COUNT:-0}",
)
NODES = 'export DEEPCLUST_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\\n" " ")'


@dataclass(frozen=True)
class Plan:
    """What would be submitted.

    Its text is the dry run.
    """

    recipe: Recipe
    run_dir: Path
    layout: Layout
    sweep_dir: Path | None = None  # the folder of the runs, where one array has several

    @property
    def spec(self) -> SlurmSpec:
        """The `slurm` section, checked."""
        return slurm_spec(self.recipe)

    @property
    def folder(self) -> Path:
        """The folder of the job's scripts and output."""
        return (self.sweep_dir or self.run_dir).absolute() / "slurm"

    @property
    def source(self) -> Path:
        """The folder for the next snapshot of the code.

        Jobs that wait keep their own.
        """
        numbers = [int(path.name.partition("-")[2]) for path in self.folder.glob("source-*")]
        return self.folder / f"source-{max(numbers, default=-1) + 1}"

    @property
    def python(self) -> str:
        """The Python on the nodes."""
        return self.spec.python or sys.executable

    @property
    def tasks(self) -> int:
        """The tasks of a node: one with Ray, with srun one for each process."""
        return 1 if self.spec.launcher == "ray" else self.layout.tasks

    @property
    def task_cpus(self) -> int:
        """The CPUs of a task.

        A step has those of all its tasks (`--cpu-bind=none`).
        """
        share = self.layout.cpus / self.tasks
        return max(1, ceil(share) if self.spec.cpus_per_node is None else floor(share))

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit's executor."""
        spec = self.spec
        wanted = {
            "job_name": self.folder.parent.name,
            "nodes": spec.nodes,
            "mem": spec.mem,
            "ntasks_per_node": self.tasks,
            "cpus_per_task": self.task_cpus,
            "gpus_per_node": self._gpus_per_node(),
            "time": None if spec.time is None else minutes(spec.time),
            "partition": spec.partition,
            "qos": spec.qos,
            "account": spec.account,
            "constraint": spec.constraint,
            "exclusive": spec.exclusive or None,
            "additional_parameters": self._more_options(),
            "setup": self.setup(),
            "teardown": ON_EXIT.read_text().splitlines(),
            "srun_args": self.srun_options(),
            "stderr_to_stdout": True,
            "signal_delay_s": spec.signal,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        return {**SUBMITIT_DEFAULTS, **given}

    def script(self, runs: int = 1) -> str:
        """Return the text that sbatch gets: a job, or an array when there are several runs.

        submitit has no public way to make it without a Slurm, so this calls what its submission
        calls. A test submits to a stand-in for sbatch and compares the two texts.
        """
        from submitit.slurm.slurm import _make_sbatch_string

        words = [self.python, "-P", "-u", "-m", "submitit.core._submit", str(self.folder)]
        array = {"map_count": runs} if runs > 1 else {}
        parameters = self.parameters() | array
        return _make_sbatch_string(shlex.join(words), self.folder, **parameters)

    def setup(self) -> list[str]:
        """Return the lines before srun."""
        spec, source = self.spec, shlex.quote(str(self.source))
        requeues = f"export DEEPCLUST_REQUEUES={spec.requeues}"
        snapshot = [f'export PYTHONPATH={source}"${{PYTHONPATH:+:$PYTHONPATH}}"']
        # set +e: whatever becomes of srun, the lines after it must run
        own = [*spec.setup, "set +e", *(snapshot if spec.snapshot else [])]
        return [*ENVIRONMENT, requeues, *own, NODES]

    def srun_options(self) -> list[str]:
        """Return the options of srun.

        CPUs are given since srun does not take them from sbatch (Slurm 22.05). The others override
        variables of the submitter's environment. With them task 0 alone decides about the end.
        """
        return [
            f"--cpus-per-task={self.task_cpus}",
            "--cpu-bind=none",
            "--distribution=block",
            "--export=ALL",
            "--kill-on-bad-exit=0",
            "--wait=0",
            *self._container_options(),
        ]

    def _container_options(self) -> list[str]:
        spec, own = self.spec, str(self.folder.parent)
        if not spec.container_image:
            return []
        mounts = ",".join([*spec.container_mounts, f"{own}:{own}"])
        # else the image's own PYTHONPATH hides the snapshot
        snapshot = ["--container-env=PYTHONPATH"] if spec.snapshot else []
        image = f"--container-image={spec.container_image}"
        return [image, f"--container-mounts={mounts}", *snapshot]

    def _gpus(self, count: int) -> str | int:
        return f"{self.spec.gpu_type}:{count}" if self.spec.gpu_type else count

    def _gpus_per_node(self) -> str | int | None:
        count = self.spec.gpus_per_node
        return self._gpus(count) if count and "gres" not in self.spec.sbatch else None

    def _more_options(self) -> dict[str, str | int | bool]:
        """Return the options of sbatch that submitit has no parameter for."""
        spec = self.spec
        given = {name: value for name, value in spec.sbatch.items() if value is not False}
        total = {"gpus": self._gpus(spec.gpus)} if spec.gpus else {}
        return {**given, **total, "requeue" if spec.requeues else "no-requeue": True}

    def __str__(self) -> str:
        return f"{self.layout}\n\n{self.shown_script()}\n{self.recipe.show()}"

    def shown_script(self, runs: int = 1) -> str:
        """Return the script for people, without the secrets in its lines."""
        text = self.script(runs)
        options = [str(value) for value in self.spec.sbatch.values()]
        for line in [*self.spec.setup, *options]:
            text = text.replace(line, command(line))
        return redact(text)


@dataclass(frozen=True)
class Sweep:
    """Runs of one array.

    They differ in nothing but the run directory and its recipe.
    """

    plans: list[Plan]

    def __str__(self) -> str:
        first, runs = self.plans[0], "\n".join(f"# {plan.run_dir}" for plan in self.plans)
        recipes = "\n".join(f"# {plan.run_dir}\n{plan.recipe.show()}" for plan in self.plans)
        return f"{runs}\n{first.layout}\n\n{first.shown_script(len(self.plans))}\n{recipes}"


def prepare(recipe: Recipe, run_dir: Path) -> Plan:
    """Return the job for a recipe.

    Nothing is written or started.

    Raises `RecipeError` when the recipe does not fit its resources, or a path does not fit Slurm.
    """
    spec, places = slurm_spec(recipe), layout(recipe)
    _check_path(str(run_dir.absolute()), spec)
    recipe = with_readers(recipe, places.rank_cpus)
    threads = recipe.train.threads or max(1, places.rank_cpus - recipe.data.readers())
    overrides = [f"train.ranks={places.ranks}", f"train.threads={threads}"]
    if spec.launcher == "ray":
        overrides += [f"ray.cpus={places.rank_cpus}", f"ray.worker_cpus={places.worker_cpus}"]
    return Plan(recipe.replace(*overrides), run_dir, places)


def prepare_sweep(plans: list[Plan], folder: Path) -> Sweep:
    """Return one array for the plans, or raise `RecipeError` when their resources differ."""
    plans = [replace(plan, sweep_dir=folder) for plan in plans]
    for plan in plans[1:]:
        if plan.parameters() != plans[0].parameters():
            raise RecipeError(
                f"{plan.run_dir.name} needs other resources than {plans[0].run_dir.name}, and the "
                "jobs of an array have the same: submit them one by one, or set slurm.* so that "
                "they are equal"
            )
    return Sweep(plans)


def _check_path(path: str, spec: SlurmSpec) -> None:
    try:
        one_line(path)
    except ValueError as error:
        raise RecipeError(f"--run: {error}") from None
    if "%" in path or "\\" in path:
        raise RecipeError(f"--run {path}: Slurm replaces % and \\ in a path; choose another name")
    if spec.container_image and set(",:") & set(path):
        raise RecipeError(
            f"--run {path}: , and : separate the mounts of a container; choose another name"
        )
