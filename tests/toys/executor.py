"""An executor that the package does not know: a queue that starts its jobs when a gate opens.

The gate is a file `open` in the folder of the runs. It shows that `--on tests.toys.executor` needs
no edit of the package: submit, sweep, status, logs, cancel and resume work by the protocol alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster_jobs import job_file
from cluster_jobs.executors import background
from cluster_jobs.executors.base import Executor, JobState, SeparateJobs, open_to_resume
from deepclust.launch.start import prepare_run
from deepclust.recipe import Recipe
from deepclust.run import lock

JOB = 'until [ -e "$1/../open" ]; do sleep 0.1; done; exec "$0" -P -c "$2" "$1"'
CONTROLLER = "import sys; from deepclust.launch.start import resume; resume(sys.argv[1])"


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    run_dir: Path

    def __str__(self) -> str:
        return f"# in the toy queue: {self.run_dir}\n{self.recipe.dump()}"


class ToyExecutor(Executor[Plan]):
    name = "tests.toys.executor"

    def prepare(self, recipe: Recipe, run_dir: Path) -> Plan:
        return Plan(recipe, run_dir)

    def prepare_sweep(self, plans: list[Plan], folder: Path) -> SeparateJobs[Plan]:
        return SeparateJobs(plans)

    def submit(self, plan: Plan) -> None:
        prepare_run(plan.recipe, plan.run_dir)
        self._queue(plan.run_dir)

    def resume(self, run_dir: Path, overrides: list[str]) -> None:
        run, recipe = open_to_resume(run_dir, overrides)
        if recipe != run.recipe:
            recipe.save(run_dir / "recipe.yaml")
        self._queue(run_dir)

    def cancel(self, run_dir: Path) -> str:
        state, pid = self.state(run_dir), lock.owner_pid(run_dir)
        if pid is not None:
            return background.stop(run_dir, pid)
        if state is None:
            return f"{run_dir} is not running"
        os.kill(job_file.read(run_dir)["pid"], signal.SIGKILL)
        return f"{run_dir} was taken out of the toy queue"

    def state(self, run_dir: Path) -> JobState | None:
        if not _is_alive(job_file.read(run_dir)["pid"]):
            return None
        waits = not (run_dir.parent / "open").exists()
        return JobState("waiting" if waits else "running", "in the toy queue")

    def _queue(self, run_dir: Path) -> None:
        words = ["sh", "-c", JOB, sys.executable, str(run_dir.absolute()), CONTROLLER]
        with open(run_dir / "logs" / "controller.log", "ab") as log:
            job = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        job_file.record(run_dir, on=self.name, pid=job.pid)


EXECUTOR = ToyExecutor()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
