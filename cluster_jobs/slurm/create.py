"""Create or continue the run of a plain sbatch script: `... create RECIPE RUN [a.b=c ...]`.

The scripts in `slurm/` call it on the first node, before `srun`. A run that exists is continued
with this job's nodes, so a job that was requeued needs nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster_jobs import job_file
from cluster_jobs.slurm.script import prepare
from deepclust.errors import DeepclustError
from deepclust.launch.start import check_changes, prepare_run, resolved
from deepclust.recipe import Recipe
from deepclust.run import directory, lock


def create(source: str, run_dir: Path, overrides: list[str]) -> None:
    """Write the run of a recipe, or what this job changes in it."""
    if directory.exists(run_dir):
        with lock.hold(run_dir):
            run = directory.open_run(run_dir)
            if int(os.environ.get("SLURM_RESTART_COUNT", 0)):  # only the resources may differ now
                overrides = [word for word in overrides if word.startswith("slurm.")]
            recipe = resolved(run.recipe.replace(*overrides))
            check_changes(run, recipe)
            prepare(recipe, run_dir).recipe.save(run_dir / "recipe.yaml")
    else:
        prepare_run(prepare(Recipe.load(source, *overrides), run_dir).recipe, run_dir)
    (run_dir / "slurm").mkdir(exist_ok=True)
    job = os.environ["SLURM_JOB_ID"]
    job_file.record(run_dir, on="slurm", job=job, git=directory.git_commit())


def main() -> int:
    """Run `create` for a script, and return the exit code."""
    source, run_dir, *overrides = sys.argv[1:]
    try:
        create(source, Path(run_dir).absolute(), overrides)
    except DeepclustError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
