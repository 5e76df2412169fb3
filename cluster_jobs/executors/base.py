"""What an executor is: a typed protocol, and the parts that executors share.

An executor decides where a run runs. A module with a name `EXECUTOR` that fulfils the protocol can
be used by its dotted name, `deepclust submit ... --on my.module`, without an edit of this package.
Classes that inherit from `Executor` get its defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from deepclust.errors import RecipeError, RunHeldError
from deepclust.launch.start import changed, check_data
from deepclust.recipe import Recipe
from deepclust.run import directory, lock
from deepclust.run.directory import Run
from deepclust.run.links import refuse_links_out

# waiting: the job is queued. running: it has its machines. stopped: it ended and can be resumed.
# failed: it ended by a fault. submitted: the queue was not asked. unknown: it does not answer.
Phase = Literal["waiting", "running", "stopped", "failed", "submitted", "unknown"]
POLL_S = 0.5


@dataclass(frozen=True)
class JobState:
    """The state of a run's job as its queue reports it, with a text for people."""

    phase: Phase
    text: str
    may_answer_later: bool = False  # for a queue that is here and does not answer now

    @property
    def is_pending(self) -> bool:
        """Whether the job runs, or will run."""
        return self.phase in ("waiting", "running")


class Plan(Protocol):
    """What would be submitted, with the dry run as its text."""

    @property
    def recipe(self) -> Recipe:
        """The recipe as the run will have it."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""


PlanT = TypeVar("PlanT", bound=Plan)


class Sweep(Protocol[PlanT]):
    """Runs that are submitted together, with the dry run as its text."""

    @property
    def plans(self) -> list[PlanT]:
        """The plan of each run."""


@dataclass(frozen=True)
class SeparateJobs(Generic[PlanT]):
    """A sweep whose runs are submitted one by one."""

    plans: list[PlanT]

    def __str__(self) -> str:
        return "\n".join(map(str, self.plans))


class Executor(Protocol[PlanT]):
    """A place where runs run, with the errors of `deepclust.errors`."""

    name: str  # the value of --on, recorded in the run's job.json
    poll_s: float = POLL_S  # seconds between two questions about a job
    asks_together: bool = False  # whether `states` of many runs is cheaper than each `state`

    def prepare(self, recipe: Recipe, run_dir: Path) -> PlanT:
        """Return what would be submitted for a recipe, without writing or starting anything."""
        ...

    def submit(self, plan: PlanT) -> None:
        """Create the run and start or queue its controller."""
        ...

    def resume(self, run_dir: Path, overrides: list[str]) -> None:
        """Start or queue a controller for a run that exists, wherever it ran before."""
        ...

    def cancel(self, run_dir: Path) -> str:
        """Stop the run at its next step, and return what became of it."""
        ...

    def state(self, run_dir: Path) -> JobState | None:
        """Return what the queue says about the run's job, or None where there is no queue.

        It never raises for a queue that does not answer, and is quick enough for a list of runs.
        """
        ...

    def states(self, run_dirs: Sequence[Path]) -> dict[Path, JobState | None]:
        """Return the state of each run's job, as `state` does."""
        return {run_dir: self.state(run_dir) for run_dir in run_dirs}

    def is_pending(self, run_dir: Path) -> bool:
        """Return whether a job of the run is queued or coming up, which may ask a cluster.

        Raises `ResourceError` when the cluster does not answer.
        """
        state = self.state(run_dir)
        return state is not None and state.is_pending

    def prepare_sweep(self, plans: list[PlanT], folder: Path) -> Sweep[PlanT]:
        """Return the sweep of these plans, whose runs lie in the folder.

        This base class raises `RecipeError`; an executor with a queue overrides it.
        """
        raise RecipeError(
            f"a sweep needs a queue, and --on {self.name} would run all at once on this machine: "
            "use --on slurm, or --on ray with --address"
        )

    def submit_sweep(self, sweep: Sweep[PlanT]) -> None:
        """Create the runs and start or queue their controllers."""
        for plan in sweep.plans:
            self.submit(plan)


def open_to_resume(run_dir: Path, overrides: list[str]) -> tuple[Run, Recipe]:
    """Return the run, and its recipe with the changes.

    Raises `RunDiffersError` for a change that a resumed run may not have, and `RunHeldError` for a
    run that a controller has.
    """
    run = directory.open_run(run_dir)
    refuse_links_out(run.path)
    recipe = changed(run, *overrides)
    check_data(run, recipe)
    if owner := lock.owner(run_dir):
        raise RunHeldError(
            f"{run_dir} is held by {owner}; end it with `deepclust cancel {run_dir}`"
        )
    return run, recipe
