#!/usr/bin/env python3
"""Measure what `cluster.overlap` saves: rounds with k-means between training, and during it.

    python tools/bench/overlap.py [--k 1000] [--epochs 6] [--times 1] [--out FILE] [a.b=c ...]

Recipe demo-fashion on Fashion-MNIST. The training rank (with its reader) and the cluster worker
are each pinned to one core, with one thread, so both modes have the same machine. Without overlap
each waits for the other. A round is an epoch: from the end of training on one plan to the end of
training on the next. The first two rounds are left out, because the first is clustered before any
training. The last is left out, because with overlap it starts no other round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust import Recipe  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from tests.killing import family, role, start  # noqa: E402 - the harness of the tests

MODES = {"without": ("cluster.where=worker",), "with": ("cluster.overlap=true",)}
ROLES = ("rank 0", "cluster worker")  # in the order of their cores
COLUMNS = {
    "round_s": "round, s", "images_per_s": "images/s", "idle": "ranks not training",
    "waiting": "waiting for the worker", "training_images_per_s": "images/s while training",
    "kmeans_s": "k-means, s",
}  # fmt: skip
PATIENCE_S = 60.0


def main() -> None:
    """Run both modes in turn, print the table, and write the measurements."""
    args = arguments()
    records = []
    for number in range(args.times):
        for mode, settings in MODES.items():
            run = train(args, f"{mode}-{number}", settings)
            rounds = list(measured(run))
            records.append({"mode": mode, "repeat": number, "rounds": rounds})
            print(mode, json.dumps(summary(rounds)), flush=True)
    args.out.write_text(json.dumps({"k": args.k, "epochs": args.epochs, "runs": records}, indent=1))
    print(table(records))


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6, help="4 or more: three are not counted")
    parser.add_argument("--times", type=int, default=1, help="runs of each mode, in turn")
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-overlap"))
    parser.add_argument(
        "--shards", type=Path, default=Path("/tmp/deepclust-quality/fashion/train"),
        help="packed there if there is nothing; the default is where quality.py has them",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-overlap.json"))
    parser.add_argument("overrides", nargs="*", help="recipe values, for both modes")
    args = parser.parse_args()
    if args.epochs < 4 or len(os.sched_getaffinity(0)) < len(ROLES):
        parser.error("needs 4 epochs or more, and two cores")
    return args


def train(args: argparse.Namespace, name: str, settings: tuple[str, ...]) -> Run:
    """Return a whole run with rank and cluster worker on their cores."""
    run = args.work / name
    shutil.rmtree(run, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.load(
        "demo-fashion", f"data.shards={shards(args)}", f"cluster.k={args.k}",
        f"train.epochs={args.epochs}", "train.threads=1", *args.overrides, *settings,
    )  # fmt: skip
    recipe.save(args.work / f"{name}.yaml")
    process = start("pretrain", args.work / f"{name}.yaml", "--run", run)
    try:
        pin(process)
        if process.wait():
            raise SystemExit(f"the run {run} failed: deepclust status {run}")
    finally:
        process.kill()
    return Run(run)


def shards(args: argparse.Namespace) -> Path:
    """Return the packed training images."""
    if not args.shards.exists():
        from cluster_jobs.demo.fashion_mnist import fetch
        from deepclust.data.pack.pack import pack

        pack(f"idx:{fetch(args.work / 'fashion-mnist')}/train", args.shards)
    return Path(args.shards)


def pin(process: subprocess.Popen[bytes]) -> None:
    """Give every role a core before it has threads, which then inherit the core."""
    cores = dict(zip(ROLES, sorted(os.sched_getaffinity(0)), strict=False))
    deadline = time.monotonic() + PATIENCE_S
    while cores and process.poll() is None and time.monotonic() < deadline:
        for pid in family(process.pid):
            core = cores.pop(role(pid, process.pid), None)
            if core is not None:
                for task in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(task), {core})
        time.sleep(0.002)
    if cores:
        raise SystemExit(f"{', '.join(cores)} did not start")


def measured(run: Run) -> Iterator[dict[str, float]]:
    """Yield seconds and shares of the rounds that count."""
    events, lines = run.events(), run.metrics("train")
    began = {e["segment"]: e["time"] for e in events if e["event"] == "training"}
    # The last line of a plan is written at its end.
    ended = {line["segment"]: line["time"] for line in lines}
    steps = {line["segment"]: line["step"] for line in lines}
    for number in sorted(began)[2:-1]:
        first, last = ended[number - 1], ended[number]
        images = (steps[number] - steps[number - 1]) * run.recipe.train.batch
        waits = [e for e in events if e["event"] == "waited" and first < e["time"] < last]
        yield {
            "round_s": last - first,
            "images_per_s": images / (last - first),
            "idle": (began[number] - first) / (last - first),
            "waiting": sum(e["seconds"] for e in waits) / (last - first),
            "training_images_per_s": images / (last - began[number]),
            "kmeans_s": kmeans_seconds(events, began[number]),
        }


def kmeans_seconds(events: list[dict[str, Any]], before: float) -> float:
    """Return the seconds of the last k-means before a time."""
    took = [e["seconds"] for e in events if e["event"] == "clustered" and e["time"] <= before]
    return float(took[-1])


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median round."""
    return {name: round(statistics.median(r[name] for r in rounds), 4) for name in COLUMNS}


def table(records: list[dict[str, Any]]) -> str:
    """Return the median round of each mode, over all its runs, as Markdown."""
    lines = ["| overlap | " + " | ".join(COLUMNS.values()) + " |", "|---" * 7 + "|"]
    median = {
        mode: summary([r for one in records if one["mode"] == mode for r in one["rounds"]])
        for mode in MODES
    }
    for mode, values in median.items():
        cells = [
            f"{value:.1%}" if name in ("idle", "waiting") else f"{value:,.1f}"
            for name, value in values.items()
        ]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    ratio = median["without"]["round_s"] / median["with"]["round_s"]
    return "\n".join([*lines, "", f"a round takes 1/{ratio:.2f} of the time with overlap"])


if __name__ == "__main__":
    main()
