#!/usr/bin/env python3
"""The estimate against the truth: what `deepclust estimate` says, and what a real run then takes.

    nice -n -19 python tools/bench/estimate_truth.py --photos SHARDS --fashion SHARDS [--times 2]

Five settings: the demo, the demo on 2 ranks, DeeperCluster, DeepCluster-v2 and SwAV, with fewer
epochs than their recipes have, and the small ones with a smaller network. Calibrations and runs
alternate, so that what else the machine does disturbs both alike, and their means are compared.
Seconds are by stage and in all, memory is that of all processes at their peak, disk is that of the
run directory at its end and at its peak. A stage of less than a twentieth of the run is shown, and
counts in the whole alone. Exit 1 if a figure is off by more than a quarter of the truth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster_jobs.estimate import Estimate, estimate  # noqa: E402
from cluster_jobs.estimate.spans import spans_of  # noqa: E402
from cluster_jobs.estimate.watch import Watch, folder_bytes  # noqa: E402
from deepclust.recipe import Recipe  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.stages.data_index import open_data_index  # noqa: E402

SMALL = ("backbone.name=conv4", "data.size=48", "data.resize=48", "data.workers=1")
OFTEN = ("train.epochs=3", "cluster.every=60 steps")
SETTINGS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # recipe, images, changes
    "demo": ("demo-fashion", "fashion", ("train.epochs=1",)),
    "2 ranks": ("demo-fashion", "fashion", ("train.epochs=1", "train.ranks=2")),
    "DeeperCluster": ("deepercluster-small-photos", "photos", (*SMALL, *OFTEN)),
    "DeepCluster-v2": ("deepcluster-v2-small-photos", "photos", (*SMALL, *OFTEN)),
    "SwAV": ("swav-small-photos", "photos", (*SMALL, "train.epochs=3")),
}
WITHIN, LEAST = 0.25, 0.05
Figures = dict[str, float]


def main() -> None:
    """Measure every setting, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="shards of small photos")
    parser.add_argument("--fashion", type=Path, required=True, help="shards of Fashion-MNIST")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-estimate-truth.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.only:
        recipe, images, changes = SETTINGS[name]
        shards = getattr(args, images)
        rows += compare(name, Recipe.load(recipe, f"data.shards={shards}", *changes), args.times)
        args.out.write_text(json.dumps(rows, indent=1))
        print(table([row for row in rows if row["setting"] == name]), flush=True)
    worst = max((row["off"] for row in rows if row["counts"]), default=0.0)
    print(f"largest difference of a figure that counts: {worst:.1%}")
    sys.exit(worst > WITHIN)


def compare(name: str, recipe: Recipe, times: int) -> list[dict[str, Any]]:
    """Calibrate and run, in turn, and return a row for each figure."""
    index = open_data_index(recipe.data)
    said, true = [], []
    for _ in range(times):
        said.append(figures_said(estimate(recipe, index, None)))
        true.append(figures_true(recipe))
    whole = mean(one["seconds in all"] for one in true)
    rows = []
    for key in true[0]:
        estimated, seen = (mean(one[key] for one in all_) for all_ in (said, true))
        rows.append({
            "setting": name, "figure": key, "estimated": estimated, "true": seen,
            "off": abs(estimated - seen) / max(seen, 1e-9),
            "counts": not key.startswith("seconds") or seen > LEAST * whole,
            "each": {"estimated": [one[key] for one in said], "true": [one[key] for one in true]},
        })  # fmt: skip
    return rows


def figures_said(made: Estimate) -> Figures:
    """Return the figures of an estimate."""
    return {
        **{f"seconds of {stage}": took for stage, took in made.seconds.items()},
        "seconds in all": made.total,
        "MB of memory": made.sizes.memory / 1e6,
        "MB of disk": made.sizes.disk / 1e6,
        "MB of disk at most": made.sizes.disk_peak / 1e6,
    }


def figures_true(recipe: Recipe) -> Figures:
    """Run the recipe as a user does, and return the same figures of it."""
    with tempfile.TemporaryDirectory(prefix="deepclust-truth-") as folder:
        file, run_dir = Path(folder, "recipe.yaml"), Path(folder, "run")
        recipe.save(file)
        command = [sys.executable, "-P", "-m", "cluster_jobs.cli", "pretrain", str(file)]
        began = time.time()
        process = subprocess.Popen(
            [*command, "--run", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with Watch(process.pid, run_dir) as watch:
            code = process.wait()
            ended = time.time()
        assert code == 0, f"the run of {recipe.method.name} ended with {code}"
        spans = spans_of(Run(run_dir), began, ended)
        return {
            **{f"seconds of {stage}": took for stage, took in spans.seconds.items()},
            "seconds in all": ended - began,
            "MB of memory": watch.memory / 1e6,
            "MB of disk": folder_bytes(run_dir) / 1e6,
            "MB of disk at most": watch.disk / 1e6,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown; in brackets what counts in the whole alone."""
    lines = ["| setting | figure | estimated | true | difference |", "|---|---|---|---|---|"]
    for row in rows:
        off = f"{row['estimated'] / max(row['true'], 1e-9) - 1:+.0%}"
        cells = (
            row["setting"], row["figure"], f"{row['estimated']:.3g}", f"{row['true']:.3g}",
            off if row["counts"] else f"({off})",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
