"""Time and peak memory of planning one epoch.

    python tools/bench/plan.py [--large] --out plan.json

The cases are 1.28 million samples in 10,000 clusters, and with --large 100 million in 320,000, of
log-normal sizes (sigma 1). Each case is a separate process. Memory is the peak resident set of the
planning, without what was resident before it: the assignments and all imports (VmHWM, Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SMALL, LARGE = (1_281_167, 10_000), (100_000_000, 320_000)
ORDERS = {
    "exact": {},
    "exact, 8 lanes": {"lanes": 8},
    "paper": {"mode": "paper"},
}


def assignments(n: int, k: int) -> np.ndarray:
    """Return assignments to clusters of log-normal sizes, int32 [n]."""
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0, 1, k)
    ends = np.cumsum(weights / weights.sum())
    return np.searchsorted(ends[:-1], rng.random(n, dtype=np.float32)).astype(np.int32)


def memory(field: str) -> int:
    """Read a size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(n: int, k: int, order: str) -> dict:
    """Plan once, in this process."""
    from deepclust.data.plan import EpochPlan

    cluster_ids = assignments(n, k)
    EpochPlan.build(cluster_ids[:1000], seed=0, epoch=0, global_batch=256)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = memory("VmRSS"), time.perf_counter()
    plan = EpochPlan.build(cluster_ids, seed=0, epoch=0, global_batch=256, **ORDERS[order])
    seconds, peak = time.perf_counter() - began, memory("VmHWM") - before
    drawn = np.bincount(cluster_ids[plan.ids], minlength=k)
    drawn = drawn[np.bincount(cluster_ids, minlength=k) > 0]
    spread = [int(drawn.min()), int(drawn.max())]
    return {"n": n, "k": k, "order": order, "seconds": seconds, "peak": peak, "draws": spread}


def main() -> None:
    """Measure every case, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--large", action="store_true", help="also 100M x 320,000: 24 GB machine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-plan.json"))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        n, k, order = options.measure
        print(json.dumps(measure(int(n), int(k), order)))
        return
    rows = []
    print(f"{'samples':>12}{'clusters':>10}  {'order':<16}{'s':>8}{'peak MB':>10}  draws a cluster")
    for n, k in (SMALL, LARGE) if options.large else (SMALL,):
        for order in ORDERS:
            command = [sys.executable, __file__, "--measure", str(n), str(k), order]
            runs = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(options.repeats if n < 10_000_000 else 1)
            ]
            rows.append(min(runs, key=lambda run: run["seconds"]))
            rows[-1]["peak"] = max(run["peak"] for run in runs)
            low, high = rows[-1]["draws"]
            print(
                f"{n:>12,}{k:>10,}  {order:<16}{rows[-1]['seconds']:>8.2f}"
                f"{rows[-1]['peak'] / 1e6:>10.0f}  {low}-{high}"
            )
    options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
