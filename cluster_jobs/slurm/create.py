"""Make or take up the run of a plain sbatch script: `... create RECIPE RUN [a.b=c ...]`.

The scripts in `slurm/` call it on the first node, before `srun`. A run that is there already is
continued with this job's nodes, so a job that was queued again needs nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster_jobs import job_file
from cluster_jobs.executors import slurm as executor
from deepclust.errors import DeepclustError
from deepclust.launch.start import check_changes, prepare_run, resolved
from deepclust.recipe import Recipe
from deepclust.run import directory, lock


def create(source: str, run: Path, overrides: list[str]) -> None:
    """Write the run of a recipe, or what this job changes in it. Raises `deepclust.errors`."""
    if directory.exists(run):
        with lock.hold(run):
            found = directory.open_run(run)
            if int(os.environ.get("SLURM_RESTART_COUNT", 0)):  # then only what the job has differs
                overrides = [o for o in overrides if o.startswith("slurm.")]
            recipe = resolved(found.recipe.replace(*overrides))
            check_changes(found, recipe)
            executor.prepare(recipe, run).recipe.save(run / "recipe.yaml")
    else:
        plan = executor.prepare(Recipe.load(source, *overrides), run)
        prepare_run(plan.recipe, run)
    (run / "slurm").mkdir(exist_ok=True)
    job_file.record(run, on="slurm", job=os.environ["SLURM_JOB_ID"], git=directory.git_commit())


def main() -> int:
    """For the scripts."""
    source, run, *overrides = sys.argv[1:]
    try:
        create(source, Path(run).absolute(), overrides)
    except DeepclustError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
