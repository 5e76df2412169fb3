"""DeepCluster's whole clustering step on a CPU, theirs and ours: 40,000 x 4096 -> 256, k = 1000.

Time ratios and peak RssAnon above the value after the imports. The whitened rows of both differ in
signs only, so the inertia of each is judged on its own rows and is comparable.
"""

from __future__ import annotations

import argparse
import sys

import data
import processes
import report

CONTENDERS = ("ours", "original")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    sizes = {"n": 40_000, "D": 4096, "dim": 256, "k": 1000, "iterations": 20, "seeds": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--busy", action="store_true", help="one other process keeps a core busy")


def run(options: argparse.Namespace) -> dict:
    """Both in turn, every seed."""
    raw = data.mixture(options.work, options.n, options.D, "float32")
    runs = []
    for seed in range(options.seeds):
        with processes.busy(options.busy):
            for name in CONTENDERS[:: 1 if seed % 2 else -1]:
                runs.append(one(options, raw, seed, name))
    return {"data": data.facts(raw), "table": summary(runs, options), "runs": runs}


def one(options: argparse.Namespace, raw, seed: int, name: str) -> dict:
    """One step in its process, and the referee on what it made."""
    job = {
        "raw": str(raw), "ids": str(data.start_ids(options.work, raw, options.k, seed)),
        "dim": options.dim, "k": options.k, "iterations": options.iterations, "seed": seed,
        "centroids": str(options.work / f"centroids-{name}.npy"),
        "whitened": str(options.work / f"rows-{name}.npy"),
    }  # fmt: skip
    found = {"name": name, "seed": seed, **processes.call("step", name, job, options)}
    print(f"seed {seed} {name}: {found.get('error') or found['parts']}", file=sys.stderr)
    if "error" in found:
        return found
    judged = {"rows": job["whitened"], "centroids": job["centroids"]}
    return found | processes.call("referee", "judge", judged, options)


def summary(runs: list[dict], options: argparse.Namespace) -> list[dict]:
    """A line for each of the two."""
    whole = options.n * options.D * 4 / 1e6
    lines = []
    for name in CONTENDERS:
        parts = [run["parts"] for run in runs if run["name"] == name and "parts" in run]
        peaks = report.of(runs, name, "peak_MB")
        lines.append({
            "contender": name,
            "seconds": report.spread(report.of(runs, name, "seconds"), "{:.1f}"),
            **{part: report.spread([p[part] for p in parts if part in p], "{:.2f}")
               for part in ("whitening", "kmeans", "labels")},
            "time, ours / it": report.spread(report.ratios(runs, "ours", name, "seconds")),
            "peak MB": report.spread(peaks, "{:.0f}"),
            f"of n x D ({whole:.0f} MB)": report.spread([p / whole for p in peaks]),
            "inertia, ours / it": report.spread(
                report.ratios(runs, "ours", name, "inertia"), "{:.5f}"),
            "error": report.errors(runs, name),
        })  # fmt: skip
    return lines
