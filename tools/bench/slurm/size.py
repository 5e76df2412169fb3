#!/usr/bin/env python3
"""Slurm at size: an array of 200 jobs, and `status` of 1,000 runs, on a real Slurm here.

    python tools/bench/slurm/size.py --out tools/bench/measured/slurm-size.json

A Slurm of two nodes on this machine (see `slurm_here.py`), whose partition is down, so that jobs
wait in the queue. `submit` is one command with a sweep of 200 values. The 1,000 runs are copies of
a finished one; Slurm is not asked about those that have ended. `status` is a new process. Counted
are its seconds, its core-seconds, and the questions to Slurm, by programs of these names that note
the call and run the real one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from cluster_jobs import job_file  # noqa: E402
from deepclust import pretrain  # noqa: E402
from tests import tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.slurm.slurm_here import SlurmHere, running  # noqa: E402

ASKED = ("squeue", "sacct", "sbatch")


def main() -> None:
    """Measure, print and write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-slurm-size.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running() as slurm:
        slurm.call("scontrol", "update", "PartitionName=low", "State=DOWN")
        calls = Calls(Path(name))
        recipe = tiny.tiny_recipe(tiny.tiny_shards(Path(name) / "shards"), "train.ranks=1")
        recipe.save(Path(name) / "recipe.yaml")
        array = submitted(slurm, Path(name), args.jobs, calls)
        waiting = looked_at(Path(name) / "sweep", args.times, calls)
        pretrain(recipe, Path(name) / "finished")
        copied(
            Path(name) / "finished", Path(name) / "many", args.runs, array.pop("array"), args.jobs
        )
        many = looked_at(Path(name) / "many", args.times, calls)
    facts = {"load": os.getloadavg(), "submit": array, "status of these": waiting,
             "status of many": many}  # fmt: skip
    print(json.dumps(facts, indent=1))
    args.out.write_text(json.dumps(facts, indent=1) + "\n")


class Calls:
    """Programs before Slurm's that count how often they are run."""

    def __init__(self, folder: Path) -> None:
        self.file, programs = folder / "calls", folder / "programs"
        programs.mkdir()
        for name in ASKED:
            real = shutil.which(name)
            (programs / name).write_text(
                f'#!/bin/sh\necho {name} >> {self.file}\nexec {real} "$@"\n'
            )
            (programs / name).chmod(0o755)
        os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"

    def take(self) -> dict[str, int]:
        """Return the calls since the last time."""
        words = self.file.read_text().split() if self.file.exists() else []
        self.file.unlink(missing_ok=True)
        return dict(Counter(words))


def submitted(slurm: SlurmHere, folder: Path, jobs: int, calls: Calls) -> dict[str, Any]:
    """Submit a sweep by one command; which array it is, and what the queue has of it."""
    values = ",".join(str(seed) for seed in range(jobs))
    words = ["submit", folder / "recipe.yaml", "--on", "slurm", "--run", folder / "sweep"]
    began = time.perf_counter()
    command(*words, "slurm.launcher=srun", "--sweep", f"seed={values}")
    seconds = time.perf_counter() - began
    queued = slurm.call("squeue", "-h", "-r", "-o", "%F %T").splitlines()
    (array,) = {line.split()[0] for line in queued}
    states = dict(Counter(line.split()[1] for line in queued))
    return {"array": array, "seconds": seconds, "calls": calls.take(), "queue": states}


def copied(run: Path, folder: Path, count: int, array: str, jobs: int) -> None:
    """Copy a finished run without its weights, and give each copy a job."""
    for number in range(count):
        copy = folder / f"run-{number:04d}"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        job = f"{array}_{number}" if number < jobs else f"9{array}{number:04d}"
        job_file.record(copy, on="slurm", job=job)


def looked_at(folder: Path, times: int, calls: Calls) -> dict[str, Any]:
    """Ask for the state of a folder's runs, several times."""
    calls.take()
    seconds, core_seconds = [], []
    for _ in range(times):
        began, before = time.perf_counter(), children_s()
        shown = command("status", folder, "--json")
        seconds.append(time.perf_counter() - began)
        core_seconds.append(children_s() - before)
    states = Counter(one["state"] for one in json.loads(shown))
    return {"runs": dict(states), "seconds": seconds, "median": statistics.median(seconds),
            "core-seconds": statistics.median(core_seconds),
            "calls, all times": calls.take()}  # fmt: skip


def command(*words: object) -> str:
    """Run `deepclust` with these words in a new process, and return its output."""
    return subprocess.run(
        tiny.command(*words), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def children_s() -> float:
    """Return the core-seconds of the processes that we started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
