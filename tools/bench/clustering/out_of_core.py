"""k-means on a memory-mapped float16 file larger than what it may allocate: 20M x 64, k = 1000.

The peak is RssAnon above the value after the imports; the labels alone are 4 bytes a row. FAISS and
scikit-learn need all rows in memory as float32, so they are not here.
"""

from __future__ import annotations

import argparse
import time

import data
import numpy as np
import processes
from memory import Peak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    sizes = {"n": 20_000_000, "dim": 64, "k": 1000, "iterations": 3, "seed": 0}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)


def run(options: argparse.Namespace) -> dict:
    """Once, in a process."""
    rows = data.mixture(options.work, options.n, options.dim, "float16", unit=True)
    job = {
        "rows": str(rows), "ids": str(data.start_ids(options.work, rows, options.k, options.seed)),
        "iterations": options.iterations, "seed": options.seed,
    }  # fmt: skip
    found = processes.call("out_of_core", "measure", job, options, limit=24 * 3600)
    file = options.n * options.dim * 2 / 1e6
    line = {"rows": f"{options.n:,} x {options.dim} float16", "file MB": f"{file:.0f}"}
    line |= {key: f"{value:.1f}" for key, value in found.items() if isinstance(value, float)}
    return {"data": data.facts(rows), "table": [line | {"error": found.get("error", "")}],
            "runs": [found]}  # fmt: skip


def measure(job: dict) -> dict:
    """Ours on the file; `pass_s` is the time of one of the iterations + 1 passes."""
    from deepclust import kmeans

    rows = np.load(job["rows"], mmap_mode="r")
    start = np.asarray(rows[np.load(job["ids"])], np.float32)
    kmeans(np.array(rows[:2000]), 10, iterations=1)
    with Peak() as peak:
        began = time.perf_counter()
        found = kmeans(rows, len(start), iterations=job["iterations"], init=start, seed=job["seed"])
        seconds = time.perf_counter() - began
    return {
        "peak_MB": peak.bytes / 1e6,
        "peak_bytes_a_row": peak.bytes / len(rows),
        "seconds": seconds,
        "pass_s": seconds / (job["iterations"] + 1),
        "history": [iteration.inertia for iteration in found.history],
        "environment": processes.environment(),
    }
