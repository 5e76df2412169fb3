"""Inputs on which k-means leaves clusters empty: who still does after the final assignment?

90 % exact duplicates, k near n, Zipf sizes, half of the rows constant, all of them. `own` counts
the clusters without a row in the labels that the library returns, `float64` those after the
referee's assignment to the returned centroids. An error is the message that the user would see.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import data
import numpy as np
import processes

CONTENDERS = ("ours", "ours relocate", "faiss", "sklearn")
LIMIT_S = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    for name, value in {"n": 20_000, "dim": 64, "iterations": 20, "seeds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)


def stress(options: argparse.Namespace) -> dict[str, tuple[np.ndarray, int]]:
    """Rows and k of every set, by name."""
    n, draws = options.n, np.random.default_rng(0)
    rows = np.array(np.load(data.mixture(options.work, n, options.dim, "float32"), mmap_mode="r"))
    twice = rows[draws.integers(0, n // 10, n)]
    half = np.where(np.arange(n)[:, None] % 2 == 0, rows[0], rows)
    return {
        "90 % duplicates": (twice, n // 20),
        "k near n": (rows[: n // 4], n // 4 - 50),
        "Zipf sizes": (rows, n // 20),
        "half constant": (half, n // 20),
        "constant": (np.broadcast_to(rows[0], rows.shape), 10),
    }


def run(options: argparse.Namespace) -> dict:
    """Everyone on every set."""
    runs = []
    for name, (rows, k) in stress(options).items():
        path = options.work / f"stress-{name.replace(' ', '-').replace('%', 'percent')}.npy"
        np.save(path, rows)
        path.with_suffix(".hash").unlink(missing_ok=True)
        facts = data.facts(path)
        for seed in range(options.seeds):
            ids = data.start_ids(options.work, path, k, seed)
            runs += [one(options, path, ids, k, seed, who) | {"set": name, "data": facts}
                     for who in CONTENDERS]  # fmt: skip
    return {"table": summary(runs), "runs": runs}


def one(options: argparse.Namespace, rows: Path, ids: Path, k: int, seed: int, who: str) -> dict:
    """One contender on one set."""
    job = {
        "name": who.split()[0], "rows": str(rows), "ids": str(ids), "seed": seed,
        "iterations": options.iterations, "options": {"empty": "relocate"} if " " in who else {},
        "centroids": str(options.work / "centroids-stress.npy"),
    }  # fmt: skip
    found = processes.call("contenders", "measure", job, options, LIMIT_S)
    if "error" not in found:
        judged = {"rows": str(rows), "centroids": job["centroids"]}
        found |= processes.call("referee", "judge", judged, options)
    print(f"{rows.stem} {who}: {found.get('error') or found['empties']}", file=sys.stderr)
    return {"name": who, "k": k, "seed": seed, "n": len(np.load(rows, mmap_mode="r")), **found}


def summary(runs: list[dict]) -> list[dict]:
    """A line a run."""
    return [
        {
            "rows": run["set"],
            "n": run["n"],
            "k": run["k"],
            "contender": run["name"],
            "empty, own": run.get("own_empties", ""),
            "empty, float64": run.get("empties", ""),
            "inertia": f"{run['inertia']:.4f}" if "inertia" in run else "",
            "seconds": f"{run['seconds']:.2f}" if "seconds" in run else "",
            "error": run.get("error", ""),
        }
        for run in runs
    ]
