#!/usr/bin/env python3
"""Seconds from allocation to the first training step, and from preemption to training again.

    python tools/bench/slurm/bring_up.py [--times 3] [--out FILE]

Fashion-MNIST, recipe demo-fashion, on a Slurm of two nodes on this machine: two ranks and the
cluster worker, with both launchers in turn. When it trains, a job of a higher partition takes all
nodes for a second; the first job gets the signal USR2, stops at a step, is queued again and resumes
from that step. The parts, each from the moment before: allocated (Slurm's, in whole seconds), the
job script, its task 0, all tasks here, Ray up, the ranks placed, the first unit of features (in it
`import torch`), clustered, training (the plan, the loader), the first step. Of the preemption:
until the run has stopped and committed, until Slurm starts it again (with `cred_expire`, here 12
s), and then the same parts. The job is followed to its end, and status is compared with sacct.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from moments import moments, parts  # noqa: E402 - beside this file

from cluster_jobs import job_file, status  # noqa: E402
from cluster_jobs.demo import fashion_mnist  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from tests import tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray.nodes import events  # noqa: E402
from tests.cluster_jobs.slurm.slurm_faults import preempt, until, until_gone  # noqa: E402
from tests.cluster_jobs.slurm.slurm_here import SlurmHere, running  # noqa: E402

SETTINGS = (
    "slurm.nodes=2", "slurm.exclusive=true", "train.ranks=2", "train.epochs=2", "train.log=1",
    "data.workers=0", "train.threads=1",
)  # fmt: skip
LAUNCHERS = ("ray", "srun")


def main() -> None:
    """Run all, print the table, write the facts."""
    args = arguments()
    shutil.rmtree(args.work / "runs", ignore_errors=True)
    shards = packed(args.work)
    with running() as slurm:
        records = [
            one(slurm, args.work / "runs" / f"{launcher}-{number}", launcher, shards)
            for number in range(args.times)
            for launcher in LAUNCHERS
        ]
    args.out.write_text(json.dumps(records, indent=1))
    print(table(records))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-slurm-bring-up"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-slurm-bring-up.json"))
    return parser.parse_args()


def packed(work: Path) -> Path:
    """Shards of the 60,000 training images."""
    shards = work / "shards" / "train"
    if not (shards / "deepclust-index").exists():
        source = fashion_mnist.fetch(work / "fashion-mnist")
        tiny.deepclust("pack", f"idx:{source}/train", shards)
    return shards


def one(slurm: SlurmHere, run: Path, launcher: str, shards: Path) -> dict[str, Any]:
    """A job from its submission to its end, preempted once."""
    words = ["submit", "demo-fashion", "--on", "slurm", "--run", run, f"data.shards={shards}"]
    tiny.deepclust(*words, f"slurm.launcher={launcher}", *SETTINGS)
    name = str(job_file.read(run)["job"])
    until(lambda: Run(run).metrics("train"), "the first step")
    allocated = time.mktime(time.strptime(began(slurm, name), "%Y-%m-%dT%H:%M:%S"))
    time.sleep(3)  # until it is well under way
    struck = time.time()
    preempt(slurm, run, name)
    ended = tiny.deepclust("logs", run, "-f").stdout
    sacct, state = slurm.wait(name), status.status(Run(run)).state
    until_gone(slurm, name)
    again = moments(run, name, 1)
    stopped = events(run, "stopped")[0]["time"]
    record = {
        "launcher": launcher, "sacct": sacct, "status": state, "logs end": "finished" in ended,
        "first": parts({"allocated": allocated, **moments(run, name, 0)}),
        "again": {"stopped": stopped - struck, "job script": again["job script"] - stopped}
        | parts(again),
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def began(slurm: SlurmHere, name: str) -> str:
    """When Slurm gave the nodes."""
    return slurm.call("sacct", "-X", "-n", "-P", "-j", name, "-o", "Start").split()[-1]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: for each launcher and start the sum and its parts, medians."""
    lines = ["| launcher | from | to first step, s (least, median, most) | parts, medians |"]
    lines.append("|---|---|---|---|")
    for launcher in LAUNCHERS:
        mine = [r for r in records if r["launcher"] == launcher]
        for start, since in (("first", "allocation"), ("again", "preemption")):
            sums = sorted(sum(r[start].values()) for r in mine)
            medians = ", ".join(
                f"{part} {statistics.median(r[start][part] for r in mine):.1f}"
                for part in mine[0][start]
            )
            spread = f"{sums[0]:.1f}, {statistics.median(sums):.1f}, {sums[-1]:.1f}"
            lines.append(f"| {launcher} | {since} | {spread} | {medians} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
