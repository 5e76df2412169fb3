"""What counts as a hang, how long to wait, and how often to begin again, for every executor."""

from __future__ import annotations

from dataclasses import dataclass

from deepclust.errors import ResourceError
from deepclust.recipe import Recipe
from deepclust.run.directory import Run

AFTERMATH_S = 2.0  # for the others to report why they end, when one has
LOSS_S = 30.0  # the same where a member cannot be reached: its node may be dead
WITHOUT_PROGRESS = 3  # attempts in a row that leave nothing on disk, and then no more
UNEXPECTED = 1  # exit code of an error that is not one of `deepclust.errors`
# another attempt may mend a broken process group or a dead reader, but not bad data or NaN
MAY_PASS = (UNEXPECTED, ResourceError.exit_code)
GRACE = 1.5  # a hang stops the others too, so a process that does not answer is named first


@dataclass(frozen=True)
class Policy:
    """The limits of a worker group in seconds, the budgets, and the recipe keys that set them."""

    hang: float = 600.0
    stop: float = 120.0
    start: float = 300.0
    failures: int = 3
    preemptions: int = 100
    hang_key: str = "train.hang"
    failures_key: str = "train.restarts"

    @classmethod
    def of(cls, recipe: Recipe) -> Policy:
        """Return the policy that a recipe's `train` section asks for."""
        return cls(hang=recipe.train.hang, failures=recipe.train.restarts)


@dataclass
class Budget:
    """The faults so far, which decide between another attempt and giving up."""

    policy: Policy
    failures: int = 0
    preemptions: int = 0
    without_progress: int = 0

    def spend(self, cause: str, last: str, progress: bool) -> None:
        """Count a fault, or raise `ResourceError` when there have been too many."""
        self.without_progress = 0 if progress else self.without_progress + 1
        self.preemptions += cause == "preemption"
        self.failures += cause != "preemption"
        if self.without_progress >= WITHOUT_PROGRESS:
            raise ResourceError(
                f"{WITHOUT_PROGRESS} attempts in a row made no progress on disk. The last: {last}"
            )
        if self.failures > self.policy.failures:
            raise ResourceError(
                f"more faults than {self.policy.failures_key}={self.policy.failures} allows. "
                f"The last: {last}"
            )
        if self.preemptions > self.policy.preemptions:
            raise ResourceError(
                f"more preemptions than ray.max_preemptions={self.policy.preemptions} allows. "
                f"The last: {last}"
            )


def progress_on_disk(run: Run) -> tuple[int, int, int]:
    """Return the last step, the stages and the units on disk, of which every commit changes one."""
    steps = [int(folder.name) for folder in run.checkpoints()]
    stages = len(list(run.path.glob("rounds/*/*/DONE")))
    units = len(list(run.path.glob("rounds/*/raw/unit-*")))
    return max(steps, default=0), stages, units
