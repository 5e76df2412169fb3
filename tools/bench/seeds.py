#!/usr/bin/env python3
"""What are a few labels worth? Seeded DeepCluster beside other uses of the same labels.

    python tools/bench/seeds.py                        Fashion-MNIST, 10, 40, 250 labels, 3 seeds
    python tools/bench/seeds.py --labels 40 --rows seeded unseeded -- train.epochs=2

Every row is the accuracy on the test split with the same labels: the nearest class prototype in the
whitened features (evaluate/nearest_prototype.py), except for "supervised", whose own classifier
decides. Equal budget: the same recipe, steps and images. Rows: `seeded`; `unseeded` (one training
a seed, labels only used afterwards); `shuffled` (seeded by permuted labels); `supervised` (trained
on the labelled images alone); `random` (weights) and `pixels`. `leftout` is seeded without labels
of one class: is it found all the same? Prototypes are refined by all training rows where the recipe
does so (seeded, shuffled, leftout); the others have a second row for that. One row at a time,
finished rows are kept in --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench import quality

RECIPE = ("demo-fashion", "train.epochs=3", "train.warmup=0.1", "cluster.k=30", "cluster.dim=16")
REFINE = 4
SEEDED = ("seeds.pin_from=1", f"seeds.refine={REFINE}")  # random weights have poor prototypes
KINDS = ("seeded", "unseeded", "shuffled", "supervised", "random", "pixels", "leftout")
CLASSES = 10


def main() -> None:
    """Run what is missing, then print the tables."""
    quality.run_rows(__file__, arguments(), rows, row_file, one_row, tables)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 40, 250])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-quality"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="recipe values, for all rows")
    args = parser.parse_args()
    args.out, args.data = args.out or args.work / "seeds-rows", "fashion"
    return args


def rows(args: argparse.Namespace) -> list[str]:
    """The rows: kind, labels in all, seed. Left out is tried with the most labels only."""
    return [
        f"{kind}-{labels}-{seed}"
        for seed in range(args.seeds)
        for labels in sorted(args.labels, reverse=True)
        for kind in args.rows
        if kind != "leftout" or labels == max(args.labels)
    ]


def recipe(args: argparse.Namespace, seed: int, *more: str) -> Any:
    """The recipe that all rows share."""
    from deepclust import Recipe

    name, *own = RECIPE
    where = f"data.shards={quality.shards(args)['train']}"
    return Recipe.load(name, where, *own, *args.overrides, *more, f"seed={seed}")


def key(args: argparse.Namespace) -> str:
    """Eight digits for the recipe at seed 0, in the names of rows and runs."""
    return quality.digits(recipe(args, 0))


def row_file(args: argparse.Namespace, row: str) -> Path:
    """Where the result of a row is kept."""
    return Path(args.out, f"{row}-{key(args)}.json")


def drawn(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sample ids of `count` labels in all, equally many of each class."""
    from deepclust.world import generator

    draws = generator(seed, "bench", "seeds", count)
    each = count // CLASSES
    picks = [draws.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(CLASSES)]
    return np.concatenate(picks)


def one_row(args: argparse.Namespace) -> dict[str, Any]:
    """The accuracy of a row, and what else is asked of it."""
    from deepclust import open_index

    kind, count, seed = args.row.split("-")
    index = open_index(quality.shards(args)["train"])
    truth, seed = np.asarray(index.labels), int(seed)
    ids = drawn(truth, int(count), seed)
    classes = truth[ids]
    if kind == "shuffled":
        from deepclust.world import generator

        classes = generator(seed, "bench", "shuffled", int(count)).permutation(classes)
    if kind == "leftout":
        left = classes != seed  # class 0, 1, 2 by seed
        ids, classes = ids[left], classes[left]
    started = time.monotonic()
    wanted, embed, head = network(args, kind, int(count), seed, index, ids, classes)
    seconds = round(time.monotonic() - started, 1)
    train, test = quality.embed_splits(args, embed, wanted.data)
    if head is not None:
        return {"top1": float((head(test[0]) == test[1]).mean()), "seconds": seconds}
    return {**judge(kind, seed, wanted, train, test, ids, classes), "seconds": seconds}


def network(
    args: argparse.Namespace, kind: str, count: int, seed: int, index: Any, ids: Any, classes: Any
) -> tuple[Any, Any, Any]:
    """Return the recipe, the embedder, and for "supervised" the classifier of features."""
    from cluster_jobs.results.evaluate import load_embedder
    from deepclust.run.checkpoint import load_latest
    from deepclust.run.directory import Run
    from deepclust.trained.saved import fresh_embedder

    wanted = recipe(args, seed)
    if kind == "pixels":
        return wanted, quality.flatten, None
    if kind == "random":
        return wanted, fresh_embedder(wanted), None
    name = f"unseeded-{seed}" if kind == "unseeded" else f"{kind}-{count}-{seed}"
    run = args.work / f"seeds-{name}-{key(args)}"
    more = []
    if kind in ("seeded", "shuffled", "leftout"):
        table = args.work / f"labels-{name}.csv"
        lines = [f"{index.keys[int(i)]},{c}" for i, c in zip(ids, classes, strict=True)]
        table.write_text("\n".join(["key,class", *lines]) + "\n")
        more = [f"seeds.labels={table}", *SEEDED]
    if kind == "supervised":
        more = supervised(wanted, run, index, ids, classes)
    wanted = recipe(args, seed, *more)
    quality.train_run(wanted, run, shuffled=False)
    head = None
    if kind == "supervised":
        tensors = load_latest(Run(run), lambda text: None).parts["model"]
        weight, bias = (tensors[f"head.{name}"].numpy() for name in ("weight", "bias"))
        head = lambda rows: (rows @ weight.T + bias).argmax(1)  # noqa: E731
    return wanted, load_embedder(Run(run)), head


def supervised(wanted: Any, run: Path, index: Any, ids: Any, classes: Any) -> list[str]:
    """Overrides for a run whose only round is the labels: no clustering, as many steps."""
    from deepclust.files import write_json
    from deepclust.run.directory import seal

    stage = run.with_name(run.name + "-labels") / "rounds" / "0000"
    labels = np.full((1, len(index)), -1, np.int32)
    labels[0, ids] = classes
    if not (stage / "assignments" / "DONE").exists():
        for folder in ("centroids", "assignments"):
            (stage / folder).mkdir(parents=True, exist_ok=True)
        np.save(stage / "centroids" / "centroids.npy", np.zeros((1, CLASSES, 2), np.float32))
        np.save(stage / "assignments" / "assignments.npy", labels)
        write_json(stage / "assignments" / "statistics.json", {})
        for folder in ("centroids", "assignments"):
            seal(stage / folder, {"data": index.fingerprint})
    steps = wanted.train.epochs * (len(index) // wanted.train.batch)
    return [f"cluster.k={CLASSES}", f"cluster.every={steps} steps", f"init.assignments={stage}"]


def judge(
    kind: str, seed: int, wanted: Any, train: Any, test: Any, ids: Any, classes: Any
) -> dict[str, Any]:
    """Nearest prototype, and for seeded ones what one more clustering does with the points."""
    from deepclust.evaluate.frozen import SeedRows, freeze
    from deepclust.evaluate.nearest_prototype import prototypes

    def scores(refine: float) -> dict[str, float]:
        seeds = SeedRows(ids, classes, refine)
        return dict(prototypes(freeze(train, test, dim=wanted.cluster.dim, seeds=seeds)))

    facts: dict[str, Any] = {**scores(wanted.seeds.refine if wanted.seeds else 0.0)}
    facts["refined"] = scores(REFINE)["top1"]
    if kind in ("seeded", "leftout"):
        facts |= clustered(seed, wanted, train, test, ids, classes, kind == "leftout")
    return facts


def clustered(
    seed: int, wanted: Any, train: Any, test: Any, ids: Any, classes: Any, leftout: bool
) -> dict[str, Any]:
    """Shares of the pinned clusters; where a class without labels goes (its id is the seed's)."""
    import torch

    from deepclust import Whitening, kmeans
    from deepclust.clustering.array_points import ArrayPoints
    from deepclust.clustering.class_prototypes import class_prototypes, refine

    whiten = Whitening.fit(train[0], wanted.cluster.dim)
    rows = whiten(train[0])
    names = sorted({str(c) for c in classes})
    numbers = np.array([names.index(str(c)) for c in classes], np.int32)
    start = class_prototypes(ArrayPoints(rows[ids]), numbers, names)
    fixed = refine(ArrayPoints(rows), start, REFINE).rows
    found = kmeans(rows, wanted.cluster.k, fixed=fixed, spherical=True, seed=seed)
    sizes = np.bincount(found.assignments, minlength=wanted.cluster.k)
    facts: dict[str, Any] = {"shares": (sizes[: len(fixed)] / sizes.sum()).round(4).tolist()}
    if not leftout:
        return facts
    probes = ArrayPoints(whiten(test[0])).configure(spherical=True, backend="torch")
    nearest = probes.assign_to(torch.from_numpy(found.centroids)).cluster_ids.numpy()
    table = np.zeros((wanted.cluster.k, CLASSES))
    np.add.at(table, (found.assignments, train[1]), 1)
    own = np.flatnonzero(table.argmax(1) == seed)  # majority by the training labels
    own = own[own >= len(fixed)]
    inside, right = np.isin(nearest, own), test[1] == seed
    return {
        **facts, "class": seed, "free clusters": len(own),
        "share in them": float(inside[right].mean()),
        "precision": float(right[inside].mean()) if inside.any() else 0.0,
    }  # fmt: skip


def tables(args: argparse.Namespace) -> str:
    """Accuracy by kind and number of labels; shares; the class that was left out."""
    lines = ["| accuracy | " + " | ".join(f"{n} labels" for n in args.labels) + " |"]
    lines.append("|---" * (len(args.labels) + 1) + "|")
    for kind in [k for k in args.rows if k != "leftout"]:
        cells = [quality.spread([r["top1"] for r in found(args, kind, n)]) for n in args.labels]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        if kind in ("unseeded", "random", "pixels"):
            cells = [
                quality.spread([r["refined"] for r in found(args, kind, n)]) for n in args.labels
            ]
            lines.append(f"| {kind}, prototypes refined | " + " | ".join(cells) + " |")
    if "seeded" in args.rows:
        for n in args.labels:
            shares = np.array([r["shares"] for r in found(args, "seeded", n)])
            summary = f"{shares.mean():.3f}, from {shares.min():.3f} to {shares.max():.3f}"
            lines.append(f"\nShare of the points of a pinned cluster, {n} labels: {summary}; "
                         f"all together {shares.sum(1).mean():.3f}.")  # fmt: skip
    if "leftout" in args.rows:
        for r in found(args, "leftout", max(args.labels)):
            lines.append(
                f"\nClass {r['class']} without labels: {r['share in them']:.3f} of its test images "
                f"are in the {r['free clusters']} free clusters where it is the majority, their "
                f"precision is {r['precision']:.3f}."
            )
    return "\n".join(lines)


def found(args: argparse.Namespace, kind: str, labels: int) -> list[dict[str, Any]]:
    """The results of a kind, one a seed."""
    files = [row_file(args, f"{kind}-{labels}-{seed}") for seed in range(args.seeds)]
    return [json.loads(file.read_text()) for file in files]


if __name__ == "__main__":
    main()
