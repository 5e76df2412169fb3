#!/usr/bin/env python3
"""Compare the features of each method with pixels, random weights and shuffled pseudo-labels.

    python tools/bench/quality.py                      Fashion-MNIST, recipe demo-fashion, 3 seeds
    python tools/bench/quality.py --data photos --seeds 1        the photos of ../shared/data
    python tools/bench/quality.py --rows deepcluster simclr      only these, and what has no seed
    python tools/bench/quality.py --budget 4 --jobs 2     fewer images, and two rows side by side
    python tools/bench/quality.py --validate --rows simclr -- train.lr=0.1     to choose settings

All methods have their shipped recipe, the same backbone, and the same number of images through it,
crops counted: a method with two crops of each image trains for half the epochs of one with one.

Each row runs in a separate process, --jobs of them side by side, which share the cores. Finished
rows are kept in --out, which is part of the repository, so the table can be filled over many days
and machines. The names of rows and runs end in a hash of the resolved recipe, so that those of a
changed recipe never mix. A new key of the recipe with a default, which means "as before", keeps
them. Every row has the same evaluators (deepclust/evaluate): weighted 20-NN, logistic regression,
and k-means. The k-means has one cluster for each class, on features whitened as in the recipe and,
spherical, on unit rows of features as they are. Its scores are means of 10 starts. "shuffled" is
the whole pipeline, with each round's pseudo-labels permuted between the images.
"simclr+deepcluster" is the second method from the weights of the first, each with half of the
images. With --validate test images are not touched: probes are fitted on five of six training
images and scored on the sixth.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "tools/bench/measured"
BUDGET = {"fashion": 16, "photos": 32}  # crops of each image through the network, or --budget
METHODS = (
    "deepcluster", "deepercluster", "deepcluster-v2", "sela",
    "swav", "dino",
    "simclr", "moco-v2", "moco-v3", "byol",
)  # fmt: skip
DATA = {  # the shipped recipe of a method, that of DeepCluster, and what all have beside it
    "fashion": ("{}-fashion", "demo-fashion", []),
    "photos": (
        "{}-small-photos",
        "small-photos",
        [
            "backbone.name=conv4",
            "data.size=48",
            "data.resize=48",
            "data.workers=1",
            "train.warmup=1",
        ],
    ),
}
CLUSTERED = ["train.lr=0.3", "train.head_lr=0.1"]
FEW = "train.batch=128"  # so that a few thousand images make enough steps an epoch
OWN = {
    "photos": {
        "deepcluster": CLUSTERED,
        "deepercluster": [*CLUSTERED, "cluster.supers=4"],
        "simclr": [FEW, "train.lr=0.3"],
        "swav": [FEW],
        "dino": [FEW],
        "moco-v2": [FEW, "train.lr=0.1"],
        "moco-v3": [FEW],
        "byol": [FEW],
    }
}
CHAINS = {
    "dino+deepcluster": ("dino", "deepcluster"),
    "simclr+deepcluster": ("simclr", "deepcluster"),
}
KINDS = ("random", *METHODS, *CHAINS, "shuffled")
COLUMNS = {
    "20-NN": ("knn", "top1"),
    "linear": ("linear", "top1"),
    "NMI, whitened": ("clusters", "nmi"),
    "accuracy": ("clusters", "accuracy"),
    "NMI, spherical": ("spherical_clusters", "nmi"),
    "accuracy, spherical": ("spherical_clusters", "accuracy"),
}
EVALUATORS = ("knn", "linear", "clusters", "spherical_clusters")
FACTS = {  # what a run cost: name and digits
    "s": ("train_seconds", 0),
    "images/s": ("images_per_s", 0),
    "not training": ("outside", 3),
    "not training, a round": ("round_outside", 3),
}
HELD_OUT = 6  # with --validate every sixth training image is scored


def main() -> None:
    """Run what is missing, then print the table."""
    run_rows(__file__, arguments(), rows, row_file, one_row, table)


def run_rows(
    script: str,
    args: argparse.Namespace,
    rows: Callable[[argparse.Namespace], list[str]],
    row_file: Callable[[argparse.Namespace, str], Path],
    one_row: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[argparse.Namespace], str],
) -> None:
    """Run one row in this process if `args` name it, else all that are missing; print the table."""
    if args.row:
        row_file(args, args.row).write_text(json.dumps(one_row(args)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def run_row(row: str) -> str:
        if not row_file(args, row).exists():
            command = [sys.executable, script, "--row", row, *sys.argv[1:]]
            subprocess.run(command, check=False, env=environment)  # the other rows go on
        return row

    shards(args)  # packed by one process
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(run_row, rows(args)):
            done = row_file(args, row)
            print(row, done.read_text() if done.exists() else "failed", flush=True)
    if failed := [row for row in rows(args) if not row_file(args, row).exists()]:
        sys.exit(f"no table: {', '.join(failed)} failed. The same command tries them again")
    print(table(args))


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="fashion")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, help="crops of each image, in place of BUDGET")
    parser.add_argument("--jobs", type=int, default=1, help="rows side by side")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-quality"))
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--validate", action="store_true", help="score on held-out training images")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="recipe values, for all rows")
    args = parser.parse_args()
    kept = "validation" if args.validate else "rows"
    args.out = args.out or MEASURED / f"{args.data}-{kept}"
    return args


def recipe_key(args: argparse.Namespace, row: str) -> str:
    """Return eight digits for what a row's seeds share: the resolved recipe at seed 0."""
    return digits(recipe(args, parts(row)[0], 0))


def digits(recipe: Any) -> str:
    """Return eight digits for what a recipe sets to something else than the default.

    Folders are left out, because every machine has others. The name of a start ends in its digits.
    """
    given = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"data": {"shards"}})
    if start := given.get("init", {}).get("weights"):
        given["init"]["weights"] = Path(start).name
    text = json.dumps([recipe.method.name, given], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def row_file(args: argparse.Namespace, row: str) -> Path:
    """Return the file that keeps the scores of a row."""
    return Path(args.out, f"{row}-{recipe_key(args, row)}.json")


def rows(args: argparse.Namespace) -> list[str]:
    """Return the names of the rows, one for each seed where anything is random."""
    kinds = [f"{kind}-{seed}" for seed in range(args.seeds) for kind in args.rows]
    return ["pixels", "pixels-pca64", *kinds]


def parts(row: str) -> tuple[str, str]:
    """Return the kind of a row and its seed, or what is done to pixels."""
    kind, _, rest = row.partition("-") if row.startswith("pixels") else row.rpartition("-")
    return kind, rest


def one_row(args: argparse.Namespace) -> dict[str, Any]:
    """Return the scores of a row, and what it cost."""
    from deepclust.evaluate import evaluate_features

    started = time.monotonic()
    kind, seed = parts(args.row)
    train, test, facts = pixels(args, seed) if kind == "pixels" else network(args, kind, int(seed))
    trained = time.monotonic() - started
    dim = recipe(args, "random", 0).cluster.dim
    scores = evaluate_features(train, test, EVALUATORS, dim=dim)
    return {**scores, "seconds": round(trained, 1), **facts}


def shards(args: argparse.Namespace) -> dict[str, Path]:
    """Labelled train and test shards, packed when first asked for."""
    from deepclust.data.pack.pack import pack

    out = args.work / args.data
    if args.data == "fashion":
        from cluster_jobs.demo.fashion_mnist import fetch

        source = fetch(args.work / "fashion-mnist")
        sources = {"train": f"idx:{source}/train", "test": f"idx:{source}/t10k"}
    else:
        photos = args.work / "imagenette"
        sources = {"train": str(photos / "train"), "test": str(photos / "val")}
        if not photos.exists():
            photos.mkdir(parents=True)
            archive = ROOT.parent / "shared/data/imagenette96.tar.xz"
            subprocess.run(["tar", "-xJf", archive, "-C", photos], check=True)
    for split, source in sources.items():
        if not (out / split).exists():
            pack(source, out / split)
    return {split: out / split for split in sources}


def recipe(args: argparse.Namespace, kind: str, seed: int) -> Any:
    """Return the recipe of a kind of rows, DeepCluster's for those that train nothing.

    Of a chain it is the second method's, with the first one's as a start that is yet to train.
    """
    if kind not in CHAINS:
        return of_method(args, kind, seed, budget(args))
    first, second = (of_method(args, one, seed, budget(args) // 2) for one in CHAINS[kind])
    start = args.work / f"{args.data}-{kind}-{seed}-{digits(first)}-first"
    return second.replace(f"init.weights={start}")


def budget(args: argparse.Namespace) -> int:
    """Return how many crops of each image go through the network."""
    return int(args.budget or BUDGET[args.data])


def of_method(args: argparse.Namespace, kind: str, seed: int, seen: int) -> Any:
    """Return the recipe of a method that sees every image `seen` times, crops counted."""
    from deepclust import Recipe

    by_method, plain, overrides = DATA[args.data]
    given = args.overrides
    if kind not in METHODS:  # pixels, and random weights
        kind, given = "deepcluster", [text for text in given if not text.startswith("method.")]
    name = plain if kind == "deepcluster" else by_method.format(kind)
    overrides = [*overrides, *OWN.get(args.data, {}).get(kind, []), *given]
    where = f"data.shards={shards(args)['train']}"
    chosen = Recipe.load(name, where, *overrides, f"seed={seed}")
    if any(text.startswith("train.epochs=") for text in args.overrides):
        return chosen
    crops = sum(one.count for one in chosen.method.crops(chosen.data))
    return chosen.replace(f"train.epochs={max(1, seen // crops)}", *rounds(args, chosen, seen))


def rounds(args: argparse.Namespace, chosen: Any, seen: int) -> list[str]:
    """Return how many rounds a recipe that counts them has, of fewer images in proportion."""
    every = chosen.clustering.every if chosen.method.round else ""
    if not every.endswith("rounds") or seen == BUDGET[args.data]:
        return []
    count = int(every.split()[0]) * seen / BUDGET[args.data]
    return [f"cluster.every={max(1, round(count))} rounds"]


def flatten(images: Any) -> Any:
    """Return images as rows of numbers, one channel where all three are equal."""
    grey = bool((images[:, 0] == images[:, 2]).all())
    return (images[:, :1] if grey else images).flatten(1).float() / 255


def pixels(args: argparse.Namespace, how: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return pixels as features: raw, or their 64 principal components (not whitened)."""
    from sklearn.decomposition import PCA

    data = recipe(args, "pixels", 0).data
    if args.data == "photos":
        data = data.model_copy(update={"size": 32, "resize": 32})
    train, test = embed_splits(args, flatten, data)
    if how:
        fitted = PCA(64, random_state=0).fit(train[0])
        train, test = ((fitted.transform(x).astype(np.float32), y) for x, y in (train, test))
    return train, test, {}


def network(args: argparse.Namespace, kind: str, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return features of the recipe's network: at random initialisation, or trained."""
    from cluster_jobs.results.evaluate import load_embedder
    from deepclust.run.directory import Run
    from deepclust.trained.saved import fresh_embedder

    wanted = recipe(args, kind, seed)
    if kind == "random":
        return (*embed_splits(args, fresh_embedder(wanted), wanted.data), {})
    name = f"{kind}-{seed}"
    run_dir = args.work / f"{args.data}-{name}-{recipe_key(args, name)}"
    if kind in CHAINS:
        first = of_method(args, CHAINS[kind][0], seed, budget(args) // 2)
        train_run(first, Path(wanted.init.weights), shuffled=False)
    train_run(wanted, run_dir, shuffled=kind == "shuffled")
    run = Run(run_dir)
    facts = cost(run, wanted.train.batch)
    return (*embed_splits(args, load_embedder(run), wanted.data), facts)


def embed_splits(args: argparse.Namespace, embed: Any, data: Any) -> tuple[Any, Any]:
    """Return features and labels of the train and of the test shards."""
    from cluster_jobs.results.evaluate import labelled_features
    from deepclust import open_index

    folders = shards(args)
    names = ["train"] if args.validate else ["train", "test"]
    splits = [labelled_features(embed, open_index(folders[split]), data) for split in names]
    if args.validate:
        x, y = splits[0]
        scored = np.arange(len(x)) % HELD_OUT == 0
        splits = [(x[~scored], y[~scored]), (x[scored], y[scored])]
    return splits[0], splits[1]


def cost(run: Any, batch: int) -> dict[str, Any]:
    """Seconds, images and images a second of a run, and the share of time it did not train."""
    steps, events = run.metrics("train"), run.events()
    images = steps[-1]["step"] * batch
    seconds = working_seconds(events)
    return {
        "train_seconds": round(seconds, 1), "images": images, "images_per_s": images / seconds,
        "outside": max(0.0, 1 - training_seconds(steps, batch) / seconds),
        "round_outside": round_outside(steps, events, batch),
    }  # fmt: skip


def round_outside(steps: list[dict[str, Any]], events: list[dict[str, Any]], batch: int) -> float:
    """Return the share of whole rounds in which a run did not train.

    It begins with the first training and ends with that of the last round. So the first and the
    final extraction are left out. Without a second round it ends with the export.
    """
    begun = [event for event in events if event["event"] == "training"]
    first, last = begun[0], next(one for one in begun if one["round"] == begun[-1]["round"])
    if last is first:
        (*_, exported) = (event for event in events if event["event"] == "exported")
        last = {**exported, "step": steps[-1]["step"]}
    within = [event for event in events if first["time"] <= event["time"] <= last["time"]]
    training = training_seconds(steps, batch, first["step"], last["step"])
    return max(0.0, 1 - training / working_seconds(within))


def training_seconds(
    steps: list[dict[str, Any]], batch: int, after: int = 0, until: float = math.inf
) -> float:
    """Return how long the steps of a run took, or those after a step until another."""
    before = [0, *(line["step"] for line in steps)]
    return sum(
        batch * (line["step"] - last) / line["images_per_s"]
        for line, last in zip(steps, before, strict=False)
        if after < line["step"] <= until
    )


def working_seconds(events: list[dict[str, Any]]) -> float:
    """Return how long a run was worked on: from the first to the last event of each attempt.

    What a killed attempt did after its last event is not counted.
    """
    times: dict[int, list[float]] = {}
    for event in events:
        times.setdefault(event["attempt"], []).append(event["time"])
    return sum(attempt[-1] - attempt[0] for attempt in times.values())


def train_run(wanted: Any, run: Path, *, shuffled: bool) -> None:
    """Pretrain, or go on where a stopped one is."""
    from cluster_jobs.display import Display
    from deepclust import pretrain
    from deepclust.launch.start import resume
    from deepclust.run import directory
    from deepclust.stages import round_kmeans
    from deepclust.world import generator

    honest = round_kmeans.solve_kmeans

    def permuted(points: Any, options: Any, *rest: Any) -> Any:
        found = honest(points, options, *rest)
        order = generator(options.seed, "shuffle").permutation(len(found.assignments))
        return replace(found, assignments=found.assignments[order])

    round_kmeans.solve_kmeans = permuted if shuffled else honest  # type: ignore[attr-defined]
    run.parent.mkdir(parents=True, exist_ok=True)
    with Display() as display, open(f"{run}.lock", "w") as lock:  # rows side by side may share it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists(run):
            resume(run, show=display)
        else:
            pretrain(wanted, run, display)


def table(args: argparse.Namespace) -> str:
    """Mean and spread by kind, as Markdown."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows(args):
        kind = row if row.startswith("pixels") else parts(row)[0]
        found.setdefault(kind, []).append(json.loads(row_file(args, row).read_text()))
    names = [*COLUMNS, *FACTS]
    lines = [f"| {args.data} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, records in found.items():
        cells = [spread([r[a][b] for r in records]) for a, b in COLUMNS.values()]
        for name, digits in FACTS.values():  # rows of before a fact was measured have none
            given = [one[name] for one in records if name in one]
            cells.append(spread(given, digits) if given else "-")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
