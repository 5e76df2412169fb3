#!/usr/bin/env python3
"""Clusters of images that a run has never seen, beside a clustering made of those images.

    python tools/bench/predict_new.py --run RUN --held SHARDS [--seeds 5] [--out FILE]

First `predict` is asked for the images of the run itself, and compared with `assignments`. Then the
held-out images, which have labels, get the clusters of the run. Beside them stand k-means of the
held-out images alone, of the same k and iterations: in the whitened space of the run, and in one
that is fitted to them. Each has its NMI to the labels; k-means is the mean of some seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.parquet import read_table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/bench/clustering")]

import report  # noqa: E402

from deepclust import Whitening, kmeans, open_index  # noqa: E402
from deepclust.clustering.statistics import nmi  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.run.round_files import read_assignments  # noqa: E402

CLI = [sys.executable, "-m", "cluster_jobs.cli"]


def main() -> None:
    """Compare, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True, help="labelled shards, not of the run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-predict-new.json"))
    options = parser.parse_args()
    run = Run(options.run)
    with tempfile.TemporaryDirectory(prefix="deepclust-bench-") as folder:
        differ, images = disagreements(run, Path(folder))
        rows = scores(run, options.held, options.seeds, Path(folder))
    print(f"predict and assignments differ for {differ} of {images:,} images of the run")
    print(report.markdown(rows))
    found = {"differ": differ, "images": images, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def disagreements(run: Run, folder: Path) -> tuple[int, int]:
    """Return how many images of the run have another cluster by predict, and how many it has."""
    found = predicted(run, run.recipe.data.shards, folder / "own.parquet")
    kept = read_assignments(run, run.rounds()[-1])[0]
    return int(np.count_nonzero(found != kept)), len(kept)


def predicted(run: Run, shards: object, out: Path) -> np.ndarray:
    """Return the cluster of every image of the shards, as the command says it."""
    command(["predict", run.path, "--data", shards, "--out", out])
    table = read_table(out, columns=["head", "cluster"])
    heads, clusters = (np.asarray(column) for column in table.columns)
    return np.asarray(clusters[heads == 0])


def scores(run: Run, held: Path, seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Return the NMI of each way to cluster the held-out images."""
    labels = np.asarray(open_index(held).labels)
    own = [nmi(predicted(run, held, folder / "held.parquet"), labels)]
    whitened = embedded(run, held, folder / "whitened", "--whiten")
    raw = embedded(run, held, folder / "raw")
    fitted = Whitening.fit(raw, run.recipe.clustering.dim)(raw)
    fitted = fitted / np.linalg.norm(fitted, axis=1, keepdims=True)
    ways = {
        "the run's clusters (predict)": own,
        "k-means of them, the run's whitening": fresh(run, whitened, labels, seeds),
        "k-means of them, their own whitening": fresh(run, fitted, labels, seeds),
    }
    return [
        {"clusters": way, "NMI": f"{np.mean(all_):.4f}", "spread": f"{np.std(all_):.4f}"}
        for way, all_ in ways.items()
    ]


def embedded(run: Run, held: Path, out: Path, *words: str) -> np.ndarray:
    """Return the features of the held-out images [n, d] by sample id."""
    command(["embed", run.path, "--data", held, "--out", out, "--dtype", "float32", *words])
    return np.load(out / "features.npy")


def fresh(run: Run, rows: np.ndarray, labels: np.ndarray, seeds: int) -> list[float]:
    """Return the NMI of k-means by seed."""
    section = run.recipe.clustering
    made = [kmeans(rows, section.k, section.iterations, seed) for seed in range(seeds)]
    return [nmi(np.asarray(one.assignments), labels) for one in made]


def command(words: list[object]) -> None:
    """Run a command of deepclust."""
    subprocess.run([*CLI, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
