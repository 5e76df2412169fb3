#!/usr/bin/env python3
"""Every stage of a run at 1M, 10M and 100M samples: seconds, memory, bytes, and how they grow.

    python tools/bench/hundred_million.py [--n 1000000 10000000] [--work DIR] [--out FILE]
    python tools/bench/hundred_million.py --n 100000000 --skip flat "two levels"
    python tools/bench/hundred_million.py --print            the table of what was measured

Each stage of each size is a process of its own that calls the product's functions, one after
another on the files of one run (`walk_stages.py`). Images and network are generated: the rows of a
mixture of 1,000 Gaussians, 64 dimensions. What a stage measured is kept in --out and not measured
again, so the walk can be stopped and continued. --work holds 280 bytes a sample, and is kept.

Seconds are of the stage without imports, `core` is CPU seconds of all threads, `peak` is RssAnon
above its value after the imports, `read` and `written` are what read() and write() moved.
A file that is memory-mapped is counted once. `exponent` is the slope between the largest sizes.
Under it stand costs a n + b n log2 n + c, fitted to the seconds of all sizes by least squares of
relative errors, none of the three below zero. `deepclust estimate` uses some of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE / "clustering")]

import numpy as np  # noqa: E402
import processes  # noqa: E402
import report  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

STAGES = (
    "headers", "index", "open", "extraction", "whitening", "projection", "flat", "two levels",
    "publish", "statistics", "plan", "seeds", "report", "assignments", "predict", "checkpoint",
)  # fmt: skip
SIZES = (1_000_000, 10_000_000)
MEASURED = HERE / "measured" / "walk.json"
LIMIT = 4e9  # bytes of a process


def main() -> None:
    """Measure what is missing, keep it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=SIZES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-walk"))
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--skip", nargs="*", default=[], choices=STAGES)
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        from walk_stages import FUNCTIONS  # it imports torch, for seconds

        print(json.dumps(FUNCTIONS[options.stage].measured(options.work, options.n[0])))
        return
    facts = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    for n in () if options.print else options.n:
        walk(n, options, facts)
    print(report.markdown(table(facts["rows"])))
    print(report.markdown(costs(facts["rows"])))


def walk(n: int, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Measure the stages of one size that are not measured yet."""
    done = {row["stage"] for row in facts["rows"] if row["n"] == n}
    folder = options.work / str(n)
    folder.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        if name in done or name in options.skip:
            continue
        row = {"stage": name, "n": n, **one(name, n, folder)}
        facts["rows"].append(row)
        facts["machine"] = processes.machine()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps(row), file=sys.stderr)


def one(name: str, n: int, folder: Path) -> dict[str, Any]:
    """Measure one stage in a process of its own; an error ends the walk."""
    words = [sys.executable, __file__, "--stage", name, "--n", str(n), "--work", str(folder)]
    before = os.getloadavg()[0]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} at {n:,} samples ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"load": before}


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a line for each stage and size, in the order of the stages."""
    lines = []
    for name in STAGES:
        sizes = sorted((row for row in rows if row["stage"] == name), key=lambda row: row["n"])
        for place, row in enumerate(sizes):
            last = place == len(sizes) - 1
            slopes = exponents(sizes) if last and place else {}
            lines.append(line(row, slopes))
    return lines


def line(row: dict[str, Any], slopes: dict[str, float]) -> dict[str, str]:
    """Return one line of the table."""
    over = " (over 4 GB)" if row["peak"] > LIMIT else ""
    return {
        "stage": row["stage"],
        "samples": f"{row['n']:,}",
        "s": f"{row['seconds']:.3g}",
        "core s": f"{row['core']:.3g}",
        "peak, MB": f"{row['peak'] / 1e6:,.0f}{over}",
        "read, MB": f"{row['read'] / 1e6:,.0f}",
        "written, MB": f"{row['written'] / 1e6:,.0f}",
        "exponent of core s": f"{slopes['core']:.2f}" if slopes else "",
        "of peak": f"{slopes['peak']:.2f}" if slopes else "",
        "": row.get("note", ""),
    }


def costs(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a line for each stage that was measured at two sizes or more: its fitted cost."""
    lines = []
    for name in STAGES:
        sizes = [(row["n"], row["seconds"]) for row in rows if row["stage"] == name]
        if len(sizes) > 1:
            fitted, worst = fit(*zip(*sizes, strict=True))
            cells = {key: f"{cost:.2e}" for key, cost in zip("abc", fitted, strict=True)}
            lines.append({"stage": name, **cells, "worst error": f"{worst:.0%}"})
    return lines


def fit(samples: tuple[int, ...], seconds: tuple[float, ...]) -> tuple[list[float], float]:
    """Return (a, b, c) of a n + b n log2 n + c, none negative, and the largest relative error."""
    n, taken = np.array(samples, float), np.array(seconds)
    shares = np.stack([n, n * np.log2(n), np.ones_like(n)], 1) / taken[:, None]
    unit = np.linalg.norm(shares, axis=0)  # columns of one length: n and 1 are far apart
    found, _ = nnls(shares / unit, np.ones_like(n))
    return (found / unit).tolist(), float(np.abs(shares / unit @ found - 1).max())


def exponents(sizes: list[dict[str, Any]]) -> dict[str, float]:
    """Return by which power of the samples a stage grew between the two largest sizes."""
    small, large = sizes[-2:]
    grown = math.log(large["n"] / small["n"])
    floor = {"core": 0.01, "peak": 1e6}  # below these a ratio says nothing
    return {
        key: math.log(max(large[key], least) / max(small[key], least)) / grown
        for key, least in floor.items()
    }


if __name__ == "__main__":
    main()
