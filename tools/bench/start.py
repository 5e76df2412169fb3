#!/usr/bin/env python3
"""From the command to the first step, and from a killed rank to the next one, of two trees.

    git worktree add /tmp/before COMMIT
    python tools/bench/start.py --before /tmp/before [--pairs 5] [--on local ray srun] [--readers 1]

A DeepCluster run of two ranks and a cluster worker on 1,200 images of 16 pixels, whose stages take
a second. Runs of both trees take turns, and each is a new process. "first": from the command, or
on Slurm from the start of the job, to the first training step, which is written at once. "again":
from kill -9 of rank 1 in its second round to the first step of the next attempt. On Ray the run has
a Ray of this machine alone; `srun` is a job on the two nodes of a Slurm that is started here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust.files import read_jsonl  # noqa: E402
from tests.cluster_jobs.slurm import slurm_here  # noqa: E402
from tests.tiny import tiny_recipe, tiny_shards  # noqa: E402 - the harness of the tests

PATIENCE_S = 300.0
SETTINGS = (
    "train.ranks=2", "train.epochs=200", "train.log=1", "train.batch=60",
    "train.checkpoint=10 steps", "data.extract_batch=64",
)  # fmt: skip
ON: dict[str, tuple[str, ...]] = {
    "local": (),
    "ray": ("--on", "ray"),
    "srun": ("--on", "slurm", "slurm.launcher=srun", "slurm.nodes=2"),
}


def main() -> None:
    """Run the pairs, print a table and write JSON."""
    args = arguments()
    shutil.rmtree(args.work, ignore_errors=True)
    shards = tiny_shards(args.work / "shards", n=1200)
    tiny_recipe(shards, *SETTINGS, f"data.workers={args.readers}").save(args.work / "recipe.yaml")
    trees = {"before": args.before.resolve(), "now": ROOT}
    rows: list[dict[str, Any]] = []
    for place in args.on:
        with slurm_here.running() if place == "srun" else contextlib.nullcontext():
            for pair in range(args.pairs):
                for name in sorted(trees, reverse=bool(pair % 2)):
                    times = once(trees[name], place, args.work)
                    rows.append({"on": place, "tree": name, **times})
                    print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    facts = {"readers": args.readers, "load": os.getloadavg(), "runs": rows}
    args.out.write_text(json.dumps(facts, indent=1))


def once(tree: Path, place: str, work: Path) -> dict[str, float]:
    """Return both times of a run of a tree."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    began = time.time()
    with started(tree, place, work / "recipe.yaml", run):
        if place == "srun":  # less what Slurm takes to start a job
            until(lambda: any((run / "slurm").glob("*-0")))
            began = time.time()
        first = until(lambda: steps(run, 1)) - began
        until(lambda: any(one["round"] == 1 for one in steps(run, 1)))
        placed = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "placed"][-1]
        (rank,) = [one["pid"] for one in placed["members"] if one["who"] == "rank 1"]
        struck = time.time()
        os.kill(rank, signal.SIGKILL)
        again = until(lambda: steps(run, 2)) - struck
    return {"first": round(first, 2), "again": round(again, 2)}


@contextlib.contextmanager
def started(tree: Path, place: str, recipe: Path, run: Path) -> Iterator[None]:
    """Have the run while the block lasts."""
    verb = "pretrain" if place == "local" else "submit"
    words = [verb, str(recipe), "--run", str(run), *ON[place]]
    process = subprocess.Popen(**command(tree, *words))
    try:
        yield
    finally:
        if place == "local":
            process.send_signal(signal.SIGTERM)
        else:
            subprocess.run(**command(tree, "cancel", str(run)), check=True)
        process.wait(PATIENCE_S)


def command(tree: Path, *words: str) -> dict[str, Any]:
    """Return what starts the command of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, "-m", "cluster_jobs.cli", *words], "env": environment,
        "cwd": tree, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
    }  # fmt: skip


def steps(run: Path, attempt: int) -> list[dict[str, Any]]:
    """Return the training steps of an attempt."""
    file = run / "metrics.jsonl"
    records = read_jsonl(file) if file.exists() else []
    return [one for one in records if one["kind"] == "train" and one["attempt"] == attempt]


def until(moment: Callable[[], object]) -> float:
    """Wait for a moment, and return when it was."""
    deadline = time.time() + PATIENCE_S
    while not moment():
        if time.time() > deadline:
            raise TimeoutError("the moment never came")
        time.sleep(0.02)
    return time.time()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians by place and tree, in seconds."""
    lines = [f"{'':10}{'first: before':>14}{'now':>8}{'again: before':>16}{'now':>8}"]
    for place in dict.fromkeys(row["on"] for row in rows):
        cells = [
            statistics.median(r[key] for r in rows if (r["on"], r["tree"]) == (place, tree))
            for key in ("first", "again") for tree in ("before", "now")
        ]  # fmt: skip
        lines.append(f"{place:10}{cells[0]:14.1f}{cells[1]:8.1f}{cells[2]:16.1f}{cells[3]:8.1f}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Parse the words of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="another tree of this project")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--on", nargs="+", choices=ON, default=[*ON])
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-start"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-start.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
