"""The Ray executor: a run on a standing cluster, as a Ray job, or on a Ray of this machine alone.

With `ray.address` the controller is a Ray job, which runs on the cluster. Without, it is a process
in the background of this machine, which starts a Ray for itself and ends it. Either way it is
`python -m cluster_jobs.ray.controller RUN`. All who see the run directory can watch, cancel and
resume the run.
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
from cluster_jobs.executors.base import Executor, JobState, SeparateJobs, open_to_resume
from cluster_jobs.ray import named_clusters
from cluster_jobs.ray.spec import RaySpec, ray_spec, sizes
from deepclust.errors import RecipeError, ResourceError
from deepclust.launch.start import prepare_run, with_readers
from deepclust.recipe import Recipe
from deepclust.run import lock

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}  # of a Ray job


@dataclass(frozen=True)
class Plan:
    """What would be submitted, with the dry run as its text."""

    recipe: Recipe
    run_dir: Path
    command: list[str]

    @property
    def spec(self) -> RaySpec:
        """The `ray` section, checked."""
        return ray_spec(self.recipe)

    def __str__(self) -> str:
        spec = self.spec
        where = f"a job of the Ray cluster at {spec.address}" if spec.address else "this machine"
        ranks = " or ".join(map(str, sizes(self.recipe, spec)))
        group = f"{ranks} ranks of {spec.cpus_of(self.recipe)} CPU"
        if not self.recipe.clusters_inline:
            group += f", the cluster worker of {spec.worker_cpus} CPU"
        if self.recipe.train.device != "cpu":
            group += ", a GPU each where there are GPUs"
        return f"# {where}: {group}\n{shlex.join(self.command)}\n\n{self.recipe.show()}"


class RayExecutor(Executor[Plan]):
    """Runs on Ray: on a standing cluster, or on a Ray that the run starts for itself."""

    name = "ray"

    def prepare(self, recipe: Recipe, run_dir: Path) -> Plan:
        """Return the command for a recipe, without writing or starting anything."""
        spec = ray_spec(recipe)
        recipe = with_readers(recipe, spec.cpus_of(recipe))
        if recipe.train.threads is None:  # those of the cluster's machines, not of this one
            threads = max(1, spec.cpus_of(recipe) - recipe.data.readers())
            recipe = recipe.replace(f"train.threads={threads}")
        recipe = recipe.replace(f"train.ranks={sizes(recipe, spec)[0]}")
        command = [spec.python or sys.executable, "-P", "-m", "cluster_jobs.ray.controller"]
        return Plan(recipe, run_dir, [*command, str(run_dir.absolute())])

    def submit(self, plan: Plan) -> None:
        """Create the run and start its controller."""
        if plan.spec.address:
            named_clusters.remember(plan.spec.address)
        client = _client_of(plan)
        prepare_run(plan.recipe, plan.run_dir)
        _start(plan, client)

    def resume(self, run_dir: Path, overrides: list[str]) -> None:
        """Start a controller for a run that exists, wherever it ran before."""
        run, recipe = open_to_resume(run_dir, overrides)
        plan = self.prepare(recipe, run_dir)
        if plan.spec.address and any(word.startswith("ray.address=") for word in overrides):
            named_clusters.remember(plan.spec.address)
        client = _client_of(plan)
        if recipe != run.recipe:
            with lock.hold(run_dir):
                recipe.save(run_dir / "recipe.yaml")
        _start(plan, client)

    def cancel(self, run_dir: Path) -> str:
        """Leave a request for the controller, wherever it is, and wait for its end."""
        owner, facts = lock.owner(run_dir), job_file.read(run_dir)
        job_file.ask_to_cancel(run_dir)
        if owner is None and not self.is_pending(run_dir):
            job_file.forget_cancel(run_dir)
            return f"{run_dir} is not running"
        deadline = time.monotonic() + background.CANCEL_PATIENCE_S
        while lock.owner(run_dir) is not None or self.is_pending(run_dir):
            if time.monotonic() > deadline:
                return _end(run_dir, facts)
            time.sleep(0.2)
        return f"{run_dir} was stopped; deepclust resume {run_dir} --on ray continues it"

    def state(self, run_dir: Path) -> JobState | None:
        """Return where the run was submitted, without asking the cluster."""
        facts = job_file.read(run_dir)
        if "submission" not in facts:
            return None
        text = f"submitted to Ray at {facts['address']} as {facts['submission']}"
        return JobState("submitted", text)

    def is_pending(self, run_dir: Path) -> bool:
        """Return whether its Ray job has not ended.

        Raises `ResourceError` when the cluster does not answer.
        """
        facts = job_file.read(run_dir)
        if not facts.get("submission"):
            return False
        client = _client(facts.get("address"), run_dir)
        try:
            return client.get_job_status(facts["submission"]).value not in ENDED
        except RuntimeError:  # another Ray is there now, which does not know the job
            return False

    def prepare_sweep(self, plans: list[Plan], folder: Path) -> SeparateJobs[Plan]:
        """Return the runs, or raise `RecipeError` when there is not a standing cluster."""
        if not plans[0].spec.address:
            raise RecipeError(
                "a sweep needs a queue, and a Ray of this machine alone would run all at once: use "
                "--on slurm, or --on ray with the --address of a running cluster"
            )
        return SeparateJobs(plans)


EXECUTOR = RayExecutor()


def _end(run_dir: Path, facts: dict[str, Any]) -> str:
    """End a controller that does not react to the request."""
    if facts.get("submission"):
        _client(facts.get("address"), run_dir).stop_job(facts["submission"])
        return f"{run_dir} did not stop and its Ray job {facts['submission']} was ended"
    pid = lock.owner_pid(run_dir)
    if pid is None:
        owner = lock.owner(run_dir)
        raise ResourceError(f"{run_dir} is held by {owner} and does not stop: end it there")
    return background.stop(run_dir, pid)


def _start(plan: Plan, client: JobSubmissionClient | None) -> None:
    if client is None:
        job_file.record(plan.run_dir, on="ray")
        background.start(plan.run_dir, plan.command, "controller.out")
        return
    submission = f"deepclust-{plan.run_dir.absolute().name}-{secrets.token_hex(4)}"
    job_file.record(plan.run_dir, on="ray", address=plan.spec.address, submission=submission)
    try:
        client.submit_job(
            entrypoint=shlex.join(plan.command),
            submission_id=submission,
            runtime_env={"env_vars": plan.spec.env},
            metadata={"run": str(plan.run_dir.absolute())},
        )
    except RuntimeError as error:
        raise ResourceError(f"Ray at {plan.spec.address} did not take the job: {error}") from error


def _client_of(plan: Plan) -> JobSubmissionClient | None:
    return _client(plan.spec.address, plan.run_dir) if plan.spec.address else None


def _client(address: Any, run_dir: Path) -> JobSubmissionClient:
    """Return a client of Ray Jobs at an address that the user has named.

    Raises `ResourceError` for another address, and when Ray does not answer there.
    """
    named_clusters.require_named(address, run_dir)
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray dashboard answers at {address}: {error}. Give the address that `ray start "
            "--head` has printed, or http://HOST:8265; it needs ray[default] and, on clusters with "
            "token authentication, RAY_AUTH_MODE=token and the token in ~/.ray/auth_token."
        ) from error
