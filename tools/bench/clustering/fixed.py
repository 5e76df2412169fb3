"""Centroids that a labelled seed has fixed: they must not move, and the others must not suffer.

Ours (`fixed=`) and `faiss.Kmeans(frozen_centroids=True)` start from the same m fixed centroids and
the same rows for the free ones (FAISS fills them up by its own permutation; we take them from it).
The objective is float64, over all rows and over the rows that free centroids win.

`--spherical` is how a run does it: rows and centroids of unit norm, inner product, and prototypes
that are unit means of rows near each other. FAISS then scales frozen centroids too, every time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import numpy as np
import processes
import report

CONTENDERS = ("ours", "faiss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    sizes = {"n": 50_000, "dim": 256, "k": 1000, "m": 100, "iterations": 20, "seeds": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--spherical", action="store_true", help="unit norm, inner product")
    parser.add_argument("--dtype", default="float32", help="of the rows that ours reads")


def run(options: argparse.Namespace) -> dict:
    """Both for every seed."""
    rows = data.whitened(options.work, options.n, options.dim, options.dtype)
    runs = [found for seed in range(options.seeds) for found in one_seed(options, rows, seed)]
    return {"data": data.facts(rows), "table": summary(runs), "runs": runs}


def one_seed(options: argparse.Namespace, rows: Path, seed: int) -> list[dict]:
    """The start from FAISS, both contenders, the referee."""
    names = {name: str(options.work / f"fixed-{name}.npy") for name in ("start", *CONTENDERS)}
    job = {"rows": str(rows), "seed": seed, "start": names["start"]}
    job |= {name: getattr(options, name) for name in ("m", "k", "iterations", "spherical")}
    processes.call("fixed", "make_start", job, options)
    runs = []
    for name in CONTENDERS:
        done = processes.call("fixed", name, job | {"centroids": names[name]}, options)
        if "error" not in done:
            judged = {"rows": str(rows), "centroids": names[name], "fixed": options.m}
            done |= processes.call("referee", "judge", judged, options)
        runs.append({"name": name, "seed": seed, **done})
    return runs


def summary(runs: list[dict]) -> list[dict]:
    """A line for each."""
    return [
        {
            "contender": name,
            "fixed bits changed": report.spread(report.of(runs, name, "moved"), "{:.0f}"),
            "seconds": report.spread(report.of(runs, name, "seconds")),
            "time, ours / it": report.spread(report.ratios(runs, "ours", name, "seconds")),
            "inertia, ours / it": report.spread(
                report.ratios(runs, "ours", name, "inertia"), "{:.5f}"
            ),
            "free clusters' inertia, ours / it": report.spread(
                report.ratios(runs, "ours", name, "free_inertia"), "{:.5f}"
            ),
            "empty, float64": report.spread(report.of(runs, name, "empties"), "{:.0f}"),
            "error": report.errors(runs, name),
        }
        for name in CONTENDERS
    ]


def prototypes(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and m fixed centroids: means of ten rows each, as of ten labelled images."""
    rows = np.ascontiguousarray(np.load(job["rows"], mmap_mode="r"))
    ids = np.random.default_rng([job["seed"], 1]).choice(len(rows), (job["m"], 10), replace=False)
    if not job["spherical"]:
        return rows, rows[ids].mean(1, dtype=np.float64).astype("f4")
    near = np.argsort(-(rows[ids[:, 0]].astype("f4") @ rows.astype("f4").T), kind="stable")
    means = rows[near[:, :10]].mean(1, dtype=np.float64)
    return rows, (means / np.linalg.norm(means, axis=1, keepdims=True)).astype("f4")


def make_start(job: dict) -> dict:
    """Let FAISS fill up the free centroids and stop before the first iteration."""
    rows, fixed = prototypes(job)
    found = freeze(job | {"iterations": 0}, rows)
    found.train(rows.astype("f4", copy=False), init_centroids=fixed)
    np.save(job["start"], found.centroids)
    return {}


def freeze(job: dict, rows: np.ndarray):
    """A `faiss.Kmeans` whose given centroids don't move, over all rows, without early stop."""
    import faiss

    options = {"niter": job["iterations"], "seed": job["seed"], "frozen_centroids": True}
    options |= {"max_points_per_centroid": 10_000_000, "early_stop_threshold": -1.0}
    options["spherical"] = job["spherical"]
    return faiss.Kmeans(rows.shape[1], job["k"], **options)


def faiss(job: dict) -> dict:
    """FAISS with frozen centroids, then its search."""
    rows, fixed = prototypes(job)
    rows = rows.astype("f4", copy=False)
    freeze(job | {"k": 32, "iterations": 1}, rows).train(rows[:4096], init_centroids=rows[:2])
    found = freeze(job, rows)
    began = time.perf_counter()
    found.train(rows, init_centroids=fixed)
    found.assign(rows)
    return finish(job, fixed, found.centroids, time.perf_counter() - began)


def ours(job: dict) -> dict:
    """Ours from the same start."""
    from deepclust import kmeans

    rows, fixed = prototypes(job)
    start = np.load(job["start"])
    kmeans(rows[:4096], 32, iterations=1)
    began = time.perf_counter()
    found = kmeans(
        rows, job["k"], job["iterations"], job["seed"], init=start, fixed=fixed,
        spherical=job["spherical"],
    )  # fmt: skip
    return finish(job, fixed, found.centroids, time.perf_counter() - began)


def finish(job: dict, fixed: np.ndarray, centroids: np.ndarray, seconds: float) -> dict:
    """Keep the centroids; count the fixed numbers that differ in a bit."""
    np.save(job["centroids"], centroids)
    moved = (centroids[: len(fixed)].view(np.uint32) != fixed.view(np.uint32)).sum()
    found = {"seconds": seconds, "moved": int(moved)}
    return {**found, "environment": processes.environment()}
