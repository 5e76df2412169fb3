#!/usr/bin/env python3
"""Faults of jobs on a real Slurm: what resumes by itself, what is lost, how long it takes.

    python tools/bench/slurm/faults.py [--times 3] [--kinds USR2 ...] [--out FILE]

A Slurm of two nodes on this machine (see `slurm_here.py`), a job of two ranks and the cluster
worker. The fault strikes at an instant drawn from the first half of an undisturbed run's training.
A job has resumed when Slurm has started it again and it COMPLETED with nobody's help. Bits: every
round's assignments and the final weights against a local run that nobody disturbed. Twice: stages
that were made again though they were there. Left: processes with the job's SLURM_JOB_ID after its
end. Seconds: from the fault to the next start of the job script (`cred_expire`, here 12 s, is in
it), and from there to its first step, with the parts.
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

from cluster_jobs import job_file  # noqa: E402
from deepclust import pretrain  # noqa: E402
from deepclust.world import generator  # noqa: E402
from tests import tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray.nodes import events  # noqa: E402
from tests.cluster_jobs.slurm.slurm_faults import (  # noqa: E402
    FAULTS,
    Fault,
    job_folders,
    starts,
    until,
    until_gone,
)
from tests.cluster_jobs.slurm.slurm_here import SlurmHere, running  # noqa: E402
from tests.killing import stages_done_twice  # noqa: E402

SETTINGS = ("train.ranks=2", "train.log=1")


def main() -> None:
    """Run all, print the table, write the facts."""
    args = arguments()
    shutil.rmtree(args.work, ignore_errors=True)
    shards = tiny.tiny_shards(args.work / "shards", n=300)
    recipe = tiny.tiny_recipe(shards, *SETTINGS)
    recipe.save(args.work / "recipe.yaml")
    for epochs in {FAULTS[kind].epochs for kind in args.kinds}:
        pretrain(recipe.replace(f"train.epochs={epochs}"), whole(args.work, epochs))
    with running() as slurm:
        records = [
            one(slurm, args.work, launcher, kind, number)
            for kind in args.kinds
            for launcher in args.launchers
            if launcher in FAULTS[kind].launchers
            for number in range(args.times)
        ]
    args.out.write_text(json.dumps(records, indent=1))
    print(table(records))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--launchers", nargs="+", choices=["ray", "srun"], default=["ray", "srun"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-slurm-faults"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-slurm-faults.json"))
    return parser.parse_args()


def one(slurm: SlurmHere, work: Path, launcher: str, kind: str, number: int) -> dict[str, Any]:
    """One job, one fault, and what became of it."""
    run, fault = work / f"{kind.replace(' ', '-')}-{launcher}-{number}", FAULTS[kind]
    before, name = job_folders(), submitted(work, run, launcher, fault)
    until(lambda: events(run, "training"), "training")
    time.sleep(generator(number, "bench", kind).uniform(0.0, 3.0))
    struck = time.time()
    fault.strike(slurm, run, name)
    state = slurm.wait(name, patience=300)
    until_gone(slurm, name)
    record = {"kind": kind, "launcher": launcher, "state": state, "starts": starts(run, name)}
    record |= judged(run, whole(work, fault.epochs), before) | timed(run, name, kind, struck)
    print(json.dumps(record), flush=True)
    return record


def submitted(work: Path, run: Path, launcher: str, fault: Fault) -> str:
    """The number of its job."""
    words = ["submit", work / "recipe.yaml", "--on", "slurm", "--run", run]
    settings = (f"slurm.launcher={launcher}", f"train.epochs={fault.epochs}", *fault.overrides)
    tiny.deepclust(*words, *settings)
    return str(job_file.read(run)["job"])


def whole(work: Path, epochs: int) -> Path:
    """The local run that nobody disturbs."""
    return work / f"whole-{epochs}"


def judged(run: Path, undisturbed: Path, before: set[Path]) -> dict[str, Any]:
    """Whether the result is the undisturbed run's, and what was made twice."""
    try:
        tiny.assert_same_run(run, undisturbed)
        same = True
    except AssertionError:
        same = False
    left = job_folders() - before
    return {"same": same, "twice": len(stages_done_twice(run)), "left": len(left)}


def timed(run: Path, name: str, kind: str, struck: float) -> dict[str, Any]:
    """Seconds of the second start, from the fault on."""
    if starts(run, name) < 2:
        return {}
    if kind == "time limit":
        struck = events(run, "stopped")[0]["time"]
    lived = moments(run, name, 1)
    return {"to start": lived["job script"] - struck, "parts": parts(lived)}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: one line a fault and launcher."""
    head = (
        "| fault | launcher | resumed | same bits | twice | left | to start, s | to first step, s |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for kind, launcher in dict.fromkeys((r["kind"], r["launcher"]) for r in records):
        mine = [r for r in records if (r["kind"], r["launcher"]) == (kind, launcher)]
        resumed = sum(r["state"] == "COMPLETED" and r["starts"] > 1 for r in mine)
        waits = [r["to start"] for r in mine if "to start" in r]
        ups = [sum(r["parts"].values()) for r in mine if "first step" in r.get("parts", {})]
        cells = [
            kind, launcher, f"{resumed} of {len(mine)}", str(sum(r["same"] for r in mine)),
            str(sum(r["twice"] for r in mine)), str(sum(r["left"] for r in mine)),
            _spread(waits), _spread(ups),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f}"


if __name__ == "__main__":
    main()
