"""The time to go that a run shows at a third of its way, against the truth.

    python tools/bench/eta.py --source idx:/usr/share/datasets/fashion-mnist/train \
        --work /tmp/eta --out eta.json [--set train.epochs=4]
    python tools/bench/eta.py --run RUN --out eta.json

The demo's recipe runs in a new process. Afterwards its events and metrics are given one by one to
the same `Pace` that `status` and the live display ask, up to the moment in question. The target is
20 % at one third, on a quiet machine: what else runs there changes the truth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from cluster_jobs.pace import pace_of
from deepclust.run.directory import Run

CLI = [sys.executable, "-m", "cluster_jobs.cli"]
SHARES = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4)
TARGET = 0.2


def pretrain(source: str, work: Path, overrides: list[str]) -> Path:
    """Pack the images and run the demo's recipe over them; returns the run."""
    shards, run = work / "shards", work / "run"
    if not shards.exists():
        subprocess.run([*CLI, "pack", source, str(shards)], check=True)
    words = ["pretrain", "demo-fashion", "--run", str(run), f"data.shards={shards}", *overrides]
    subprocess.run([*CLI, *words], check=True)
    return run


def compare(run_dir: Path) -> list[dict[str, float | None]]:
    """Return what the run showed at shares of its way, and what was true then."""
    run = Run(run_dir)
    events, metrics = run.events(), run.metrics("train")
    began, end = events[0]["time"], events[-1]["time"]
    records = []
    for share in SHARES:
        now = began + share * (end - began)
        known = [event for event in events if event["time"] <= now]
        left = pace_of(known, [line for line in metrics if line["time"] <= now]).left(now)
        true = end - now
        error = None if left is None else left / true - 1
        records.append({"share": share, "shown_s": left, "true_s": true, "error": error})
    return records


def main() -> int:
    """Print a table, write JSON; 1 where one third is further off than the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="what `deepclust pack` takes")
    parser.add_argument("--work", type=Path, default=Path("eta"))
    parser.add_argument("--run", type=Path, help="a finished run of one attempt, instead")
    parser.add_argument("--set", nargs="*", default=[], help="keys of the recipe: a.b=c")
    parser.add_argument("--out", type=Path, default=Path("eta.json"))
    args = parser.parse_args()
    if args.run is None and args.source is None:
        parser.error("give --source, or --run")
    before = os.getloadavg()[0]
    run = args.run or pretrain(args.source, args.work, args.set)
    records, load = compare(run), {"before": before, "after": os.getloadavg()[0]}
    for one in records:
        if one["error"] is None:
            print(f"{one['share']:4.0%}  nothing is shown yet; true {one['true_s']:.0f} s")
            continue
        shown = f"shown {one['shown_s']:6.0f} s, true {one['true_s']:6.0f} s"
        print(f"{one['share']:4.0%}  {shown}, {one['error']:+.1%}")
    print(f"load {load['before']:.1f} before, {load['after']:.1f} after")
    args.out.write_text(json.dumps({"run": str(run), "records": records, "load": load}, indent=1))
    third = next(one["error"] for one in records if one["share"] == 1 / 3)
    return int(third is None or abs(third) > TARGET)


if __name__ == "__main__":
    sys.exit(main())
