"""k-means against FAISS, scikit-learn and plain torch on a CPU: 50,000 x 256, k = 100 and 1000.

Every seed is one set of first centroids for all; the contenders take turns, another one first each
time. Ratios are ours over the peer's, paired by seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import contenders
import data
import processes
import report

FLOOR = "floor (product)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, contenders, and whether the machine has something else to do."""
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    names = list(contenders.CPU)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--busy", action="store_true", help="one other process keeps a core busy")


def run(options: argparse.Namespace) -> dict:
    """All k, seeds and contenders."""
    rows = data.whitened(options.work, options.n, options.dim)
    table, runs = [], []
    for k in options.k:
        found = [run for seed in range(options.seeds) for run in one_seed(options, rows, k, seed)]
        runs += found
        table += summary(found, k, options)
    return {"data": data.facts(rows), "table": table, "runs": runs}


def one_seed(options: argparse.Namespace, rows: Path, k: int, seed: int) -> list[dict]:
    """Everyone once, from the same centroids; then the referee, when all is quiet."""
    names = [FLOOR, *options.contenders]
    turn = seed % len(names)
    runs = []
    with processes.busy(options.busy):
        for name in names[turn:] + names[:turn]:
            runs.append(one(options, rows, k, seed, name))
            result = runs[-1].get("error") or f"{runs[-1]['seconds']:.3f} s"
            print(f"k={k} seed {seed} {name}: {result}", file=sys.stderr)
    for found in runs:
        if "centroids" in found:
            job = {"rows": str(rows), "centroids": found.pop("centroids")}
            found |= processes.call("referee", "judge", job, options)
    return runs


def one(options: argparse.Namespace, rows: Path, k: int, seed: int, name: str) -> dict:
    """One contender, or the floor, in its process."""
    job = {
        "name": name, "rows": str(rows), "iterations": options.iterations, "seed": seed,
        "ids": str(data.start_ids(options.work, rows, k, seed)),
        "centroids": str(options.work / f"centroids-{name}.npy"),
    }  # fmt: skip
    facts = {"name": name, "k": k, "seed": seed}
    if name == FLOOR:
        return facts | processes.call("floor", "measure", job, options)
    found = processes.call("contenders", "measure", job, options)
    return facts | found | ({} if "error" in found else {"centroids": job["centroids"]})


def summary(runs: list[dict], k: int, options: argparse.Namespace) -> list[dict]:
    """A line a contender: seconds, and ours over it."""
    lines = []
    for name in [*options.contenders, FLOOR]:
        updates = report.of(runs, name, "updates")
        lines.append({
            "k": k,
            "contender": name,
            "seconds": report.spread(report.of(runs, name, "seconds")),
            "time, ours / it": report.spread(report.ratios(runs, "ours", name, "seconds")),
            "inertia, ours / it": report.spread(
                report.ratios(runs, "ours", name, "inertia"), "{:.5f}"
            ),
            "empties": report.spread(report.of(runs, name, "empties"), "{:.0f}"),
            "updates": report.spread(updates, "{:.0f}"),
            "error": report.errors(runs, name),
        })  # fmt: skip
    return lines
