"""The sbatch scripts in `slurm/`, for use without submitit: made from the executor's plans.

`tools/slurm-scripts` writes them, and a test compares them with what is made here. They differ
from what `deepclust submit --on slurm` queues in two things. Recipe and run are arguments. The
job's resources are read from Slurm's variables, so that sbatch's command line can change them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from cluster_jobs.slurm.script import ENVIRONMENT, NODES, ON_EXIT, PROGRAM, Plan, prepare
from deepclust.recipe import Recipe

RECIPE = "deepcluster-resnet50-imagenet"  # any: only its batch decides whether a shape fits
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ray": (
        "Two nodes of eight GPUs, which all train and cluster; the job brings up a Ray for itself.",
        ("slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.cpus_per_node=96",
         "cluster.where=ranks"),
    ),
    "ray-spare-gpu": (
        "Two nodes of eight GPUs; one of the first node's clusters: 15 ranks train, so choose a "
        "train.batch.",
        ("slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.cpus_per_node=96", "cluster.gpus=1"),
    ),
    "srun": (
        "Two nodes of eight GPUs without Ray: srun starts one task for each process.",
        ("slurm.launcher=srun", "slurm.nodes=2", "slurm.gpus_per_node=8",
         "slurm.cpus_per_node=96", "cluster.where=ranks"),
    ),
    "srun-cpu": (
        "Two nodes without GPUs, one rank on each: a first try on any cluster.",
        ("slurm.launcher=srun", "slurm.nodes=2", "slurm.ranks=2", "slurm.cpus_per_node=14",
         "train.device=cpu"),
    ),
}  # fmt: skip
BATCH = {"ray-spare-gpu": "train.batch=240"}  # a multiple of 15 ranks
LIMIT = ("slurm.time=24h",)
FROM_SLURM = {
    "slurm.nodes": '"$SLURM_JOB_NUM_NODES"', "slurm.gpus_per_node": '"${SLURM_GPUS_ON_NODE:-0}"',
    "slurm.ranks": '"$SLURM_JOB_NUM_NODES"',
    "slurm.cpus_per_node": "$((SLURM_CPUS_PER_TASK * SLURM_NTASKS_PER_NODE))",
}  # fmt: skip
BODY = """
# What your cluster needs comes here: module load ..., source ENVIRONMENT/bin/activate

set -eu
{environment}
usage="usage: sbatch {name}.sbatch RECIPE RUN [a.b=c ...]"
recipe=${{1:?$usage}} run=$(realpath -m -- "${{2:?$usage}}")
shift 2
python=${{PYTHON:-python}}
"$python" -P -m cluster_jobs.slurm.create "$recipe" "$run" {overrides} "$@"
{nodes}
set +e
srun --unbuffered --output "$run/slurm/%j_%t_log.out" {options} \\
  "$python" -u -P -m {program} "$run"
{on_exit}"""


def scripts() -> dict[str, str]:
    """Return the text of every script, by its name."""
    return {f"{name}.sbatch": _script(name, *shape) for name, shape in SHAPES.items()}


def _script(name: str, what: str, overrides: tuple[str, ...]) -> str:
    batch = BATCH.get(name, "train.batch=256")
    recipe = Recipe.load(RECIPE, *LIMIT, batch, *overrides)
    plan = prepare(recipe, Path("/run"))
    head = f"#!/bin/bash\n# {what}\n# Made by tools/slurm-scripts; see README.md.\n"
    kept = [word for word in plan.srun_options() if not word.startswith("--cpus-per-task")]
    options = " ".join(['--cpus-per-task="$SLURM_CPUS_PER_TASK"', *map(shlex.quote, kept)])
    given = [_given(*override.partition("=")[::2]) for override in overrides]
    environment = [*ENVIRONMENT, f"export DEEPCLUST_REQUEUES={plan.spec.requeues}"]
    body = BODY.format(
        name=name,
        overrides=" ".join(given),
        options=options,
        program=PROGRAM,
        environment="\n".join(environment),
        nodes=NODES,
        on_exit=ON_EXIT.read_text(),
    )
    return head + "\n".join(_directives(plan)) + "\n" + body


def _directives(plan: Plan) -> list[str]:
    """Return the executor's #SBATCH lines without those that name a run."""
    ours = [line for line in plan.script().splitlines() if line.startswith("#SBATCH")]
    named = ("#SBATCH --job-name", "#SBATCH --output")
    return [line for line in ours if not line.startswith(named)] + ["#SBATCH --job-name=deepclust"]


def _given(key: str, value: str) -> str:
    return f"{key}={FROM_SLURM[key]}" if key in FROM_SLURM else shlex.quote(f"{key}={value}")
