"""The Ray executor: a run on a standing cluster, as a Ray job, or on a Ray of this machine alone.

With `ray.address` the controller is a Ray job: it runs on the cluster and outlives whoever has
submitted it. Without, it is a process in the background of this machine, which starts a Ray for
itself and ends it. Either way it is `python -m cluster_jobs.ray.controller RUN`, and whoever sees
the run directory can watch, cancel and resume it.
"""

from __future__ import annotations

import secrets
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster_jobs import job_file
from cluster_jobs.executors import background
from cluster_jobs.spec import RaySpec, ray_spec, sizes
from deepclust.errors import RecipeError, ResourceError
from deepclust.launch.start import check_changes, prepare_run
from deepclust.recipe import Recipe
from deepclust.run import directory, lock

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

OVER = {"SUCCEEDED", "FAILED", "STOPPED"}  # a Ray job


@dataclass(frozen=True)
class Plan:
    """What would be submitted; printing it is a dry run."""

    recipe: Recipe
    run: Path
    command: list[str]

    @property
    def spec(self) -> RaySpec:
        """The `ray` section, checked."""
        return ray_spec(self.recipe)

    def __str__(self) -> str:
        spec, worker = self.spec, not self.recipe.clusters_inline
        where = f"a job of the Ray cluster at {spec.address}" if spec.address else "this machine"
        gang = f"{' or '.join(map(str, sizes(self.recipe, spec)))} ranks of {spec.cpus} CPU"
        gang += f", the cluster worker of {spec.worker_cpus} CPU" if worker else ""
        gang += "" if self.recipe.train.device == "cpu" else ", a GPU each where there are GPUs"
        return f"# {where}: {gang}\n{shlex.join(self.command)}\n\n{self.recipe.dump()}"


def prepare(recipe: Recipe, run: Path) -> Plan:
    """The command for a recipe; nothing is written or started."""
    spec = ray_spec(recipe)
    if recipe.train.threads is None:  # of the cluster's machines, not of this one
        threads = max(1, spec.cpus - recipe.data.workers)
        recipe = recipe.replace(f"train.threads={threads}")
    recipe = recipe.replace(f"train.ranks={sizes(recipe, spec)[0]}")
    python = spec.python or sys.executable
    return Plan(
        recipe, run, [python, "-P", "-m", "cluster_jobs.ray.controller", str(run.absolute())]
    )


def submit(plan: Plan) -> None:
    """Create the run and start its controller."""
    client = _client(plan.spec.address) if plan.spec.address else None
    prepare_run(plan.recipe, plan.run)
    _start(plan, client)


@dataclass(frozen=True)
class Sweep:
    """Runs that are a job of the cluster each, which starts those that it has room for."""

    plans: list[Plan]

    def __str__(self) -> str:
        return "\n".join(map(str, self.plans))


def prepare_sweep(plans: list[Plan], folder: Path) -> Sweep:
    """The runs, which lie in the folder. Raises `RecipeError` when there is no standing cluster."""
    if not plans[0].spec.address:
        raise RecipeError(
            "a sweep needs a queue: --on slurm, or --on ray with the --address of a standing "
            "cluster; on a Ray of this machine alone all would run at once"
        )
    return Sweep(plans)


def submit_sweep(sweep: Sweep) -> None:
    """Create the runs and start their controllers."""
    for plan in sweep.plans:
        submit(plan)


def resume(run: Path, overrides: list[str]) -> None:
    """Start a controller for a run that exists, wherever it ran before."""
    found = directory.open_run(run)
    recipe = found.recipe.replace(*overrides)
    check_changes(found, recipe)
    background.refuse_held(run)
    plan = prepare(recipe, run)
    client = _client(plan.spec.address) if plan.spec.address else None
    if recipe != found.recipe:
        with lock.hold(run):
            recipe.save(run / "recipe.yaml")
    _start(plan, client)


def cancel(run: Path) -> str:
    """Leave word for the controller, wherever it is, and wait for it to go."""
    owner, facts = lock.owner(run), job_file.read(run)
    job_file.ask_to_cancel(run)
    if owner is None and not is_pending(run):
        job_file.forget_cancel(run)
        return f"{run} is not running"
    deadline = time.monotonic() + background.CANCEL_PATIENCE_S
    while lock.owner(run) is not None or is_pending(run):
        if time.monotonic() > deadline:
            return _end(run, facts)
        time.sleep(0.2)
    return f"{run} was stopped; deepclust resume {run} --on ray continues it"


def _end(run: Path, facts: dict[str, Any]) -> str:
    """End a controller that does not listen."""
    if facts.get("submission"):
        _client(facts["address"]).stop_job(facts["submission"])
        return f"{run} did not stop and its Ray job {facts['submission']} was ended"
    pid = lock.owner_pid(run)
    if pid is None:
        raise ResourceError(f"{run} is held by {lock.owner(run)} and does not stop: end it there")
    return background.stop(run, pid)


def _start(plan: Plan, client: JobSubmissionClient | None) -> None:
    if client is None:
        job_file.record(plan.run, on="ray")
        background.start(plan.run, plan.command, "controller.out")
        return
    submission = f"deepclust-{plan.run.absolute().name}-{secrets.token_hex(4)}"
    job_file.record(plan.run, on="ray", address=plan.spec.address, submission=submission)
    try:
        client.submit_job(
            entrypoint=shlex.join(plan.command), submission_id=submission,
            runtime_env={"env_vars": plan.spec.env}, metadata={"run": str(plan.run.absolute())},
        )  # fmt: skip
    except RuntimeError as error:
        raise ResourceError(f"Ray at {plan.spec.address} did not take the job: {error}") from error


def _client(address: str) -> JobSubmissionClient:
    """Ray Jobs at the address. Raises `ResourceError` when nobody answers."""
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray dashboard answers for {address}: {error}. Give the address that `ray start "
            "--head` has printed, or http://HOST:8265; it needs ray[default] and, on clusters with "
            "token authentication, RAY_AUTH_MODE=token and the token in ~/.ray/auth_token."
        ) from error


def is_pending(run: Path) -> bool:
    """Whether its Ray job has not ended, or not begun."""
    facts = job_file.read(run)
    if not facts.get("submission"):
        return False
    client = _client(facts["address"])
    try:
        return client.get_job_status(facts["submission"]).value not in OVER
    except RuntimeError:  # another Ray is there now, which knows no such job
        return False
