"""k-means on a CPU against FAISS and scikit-learn for every n, d and k of a grid, 20 iterations.

Rows are whitened, float32 and in memory. All begin with the same first centroids. One process of a
contender does every k of an n and a d; the contenders take turns, another one first for each seed.
Inertia is that of a contender's own labels, in float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import contenders
import data
import numpy as np
import processes
import report

SIZES, DIMS, COUNTS = (5_000, 50_000, 500_000), (32, 64, 256, 768), (10, 30, 100, 300, 1000, 3000)
NAMES = ("ours", "faiss", "sklearn")
BLOCK = 65_536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, and how often each cell is measured."""
    parser.add_argument("--n", type=int, nargs="+", default=SIZES)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS)
    parser.add_argument("--k", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)


def run(options: argparse.Namespace) -> dict:
    """All cells; those of one n and d share their processes."""
    runs, files = [], []
    for n, dim in product(options.n, options.dim):
        rows = data.whitened(options.work, n, dim)
        files.append(data.facts(rows))
        for seed in range(options.seeds):
            turn = seed % len(NAMES)
            for name in NAMES[turn:] + NAMES[:turn]:
                runs += one(options, rows, seed, name)
    return {"data": files, "table": table(runs), "runs": runs}


def one(options: argparse.Namespace, rows: Path, seed: int, name: str) -> list[dict]:
    """Every k of a file by one contender, in a process of its own."""
    ids = {k: str(data.start_ids(options.work, rows, k, seed)) for k in options.k}
    job = {"name": name, "rows": str(rows), "ids": ids, "iterations": options.iterations}
    found = processes.call("kmeans_grid", "measure", job | {"seed": seed}, options)
    print(f"{rows.name} seed {seed} {name}: {found}", file=sys.stderr)
    facts = {"name": name, "seed": seed, "file": rows.name}
    if "error" in found:
        return [{**facts, "k": k, **found} for k in options.k]
    return [{**facts, **cell} for cell in found["cells"]]


def measure(job: dict) -> dict:
    """Seconds and inertia of each k; the first call of a contender is not timed."""
    run = contenders.CPU[job["name"]]
    rows = np.array(np.load(job["rows"], mmap_mode="r"))
    run(rows[:4096], rows[:32], 3, job["seed"])  # a second pass is another one than the first
    cells = []
    for k, ids in job["ids"].items():
        start = rows[np.load(ids)]
        began = time.perf_counter()
        centroids, labels, _ = run(rows, start, job["iterations"], job["seed"])
        seconds = time.perf_counter() - began
        inertia = sum(
            ((rows[at : at + BLOCK].astype(float) - centroids[labels[at : at + BLOCK]]) ** 2).sum()
            for at in range(0, len(rows), BLOCK)
        )
        n, dim = rows.shape
        cells.append(
            {"n": n, "d": dim, "k": int(k), "seconds": seconds, "inertia": inertia}
        )  # fmt: skip
    return {"cells": cells}


def table(runs: list[dict]) -> list[dict]:
    """A line for each n and d: our seconds for every k, and the ratio to the faster peer."""
    lines = []
    for n, d in dict.fromkeys((run["n"], run["d"]) for run in runs if "n" in run):
        here = [run for run in runs if (run.get("n"), run.get("d")) == (n, d)]
        line: dict = {"n": n, "d": d}
        for k in dict.fromkeys(run["k"] for run in here):
            cell = [run for run in here if run["k"] == k]
            line[f"k={k}"] = "; ".join(
                [report.spread(report.of(cell, "ours", "seconds"), "{:.3g}")]
                + [report.spread(report.ratios(cell, "ours", peer, "seconds"), "{:.2f}")
                   for peer in NAMES[1:]]
            )  # fmt: skip
        lines.append(line)
    return lines
