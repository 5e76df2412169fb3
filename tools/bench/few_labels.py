#!/usr/bin/env python3
"""What are a few labels worth to every method that takes some?

    python tools/bench/few_labels.py                     Fashion-MNIST, 40, 250, 600 labels, 3 seeds
    python tools/bench/few_labels.py --data photos --labels 250 --rows supervised cm-vat
    python tools/bench/few_labels.py --validate --rows vat -- terms.vat.eps=3     to choose settings
    python tools/bench/few_labels.py --labels 250 --without 0     class 0 has no label: is it found?

Every row is the accuracy on the test images with the same labels, backbone and images a step, crops
counted. What a run itself answers is scored: its classifier, or its pinned clusters. The two
`mean-` rows train without labels. Their answer is the nearest mean of a class in whitened features
(deepclust/evaluate/nearest_prototype.py). `alone` trains on batches of labelled images only. Each
row is there once more with its labels shuffled, with 250 labels and seed 0: it must fall to chance.
With --without the table has what the evaluator `classifier` says of the open answers: accuracy of
all, share of free answers, and recall of the class without a label by its best free prototype or
cluster. `suave` is as published. `suave-free` rows have one free prototype, and a learned prior or
a uniform one. --budget sets how often an image is seen, crops counted.

Rows run in separate processes, --jobs of them side by side, and finished ones are kept in --out.
With --validate the scored images are every sixth training image, and none of them has a label.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench import quality

BUDGET = {"fashion": 2, "photos": 8}  # crops of each image through the network
CM, PSEUDO = "terms.cm.weight=0.3", "terms.pseudo_label={weight: 1, threshold: 0.95, ramp: 0.5}"
VAT = "terms.vat={weight: 1, eps: 2}"
ENTROPY = ("terms.sample_entropy.weight=0.8", "terms.batch_entropy.weight=0.8")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {  # the method of a row, and its overrides
    "supervised": ("supervised", ()),
    "alone": ("supervised", ("seeds.share=1",)),
    "pseudo": ("supervised", (PSEUDO,)),
    "vat": ("supervised", (VAT,)),
    "cm": ("supervised", (CM,)),
    "cm-pseudo": ("supervised", (CM, PSEUDO)),
    "cm-vat": ("supervised", (CM, VAT)),
    "entropy": ("supervised", ENTROPY),
    "entropy-locality": ("supervised", (*ENTROPY, "terms.locality.weight=0.1")),
    "suave": ("suave", ()),
    "suave-free": ("suave", ("method.free=1", "method.prior=learned")),
    "suave-free-uniform": ("suave", ("method.free=1", "method.prior=uniform")),
    "daino": ("daino", ()),
    "seeded": ("deepcluster", ("seeds.pin_from=1", "seeds.refine=4")),
    "mean-deepcluster-v2": ("deepcluster-v2", ()),
    "mean-swav": ("swav", ()),
}
FREE = tuple(kind for kind in ARMS if kind.startswith("suave-free"))
LEFT_OUT = ("suave", *FREE, "seeded")  # rows where a class has no label
OPEN = ("top1_open", "free", "recall_unlabelled")
SHUFFLED = 250  # labels of the rows that are there with shuffled labels too
CLASSES = 10


def main() -> None:
    """Run what is missing, then print the table."""
    quality.run_rows(__file__, arguments(), rows, row_file, one_row, table)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=quality.DATA, default="fashion")
    parser.add_argument("--labels", type=int, nargs="+", default=[40, 250, 600])
    parser.add_argument("--without", type=int, choices=range(CLASSES), help="a class, unlabelled")
    parser.add_argument("--budget", type=int, help="crops of each image, in place of BUDGET")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="rows side by side")
    parser.add_argument("--rows", nargs="+", choices=ARMS)
    parser.add_argument("--validate", action="store_true", help="score on held-out training images")
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-quality"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="recipe values, for all rows")
    args = parser.parse_args()
    if args.rows is None:
        labelled = [kind for kind in ARMS if kind not in FREE]
        args.rows = labelled if args.without is None else LEFT_OUT
    kept = "validation" if args.validate else "rows"
    args.out = args.out or quality.MEASURED / f"{args.data}-few-{kept}"
    return args


def rows(args: argparse.Namespace) -> list[str]:
    """Return the names of the rows: kind, labels in all, seed, and what is odd about them."""
    if args.without is not None:
        odd = f"without-{args.without}"
        return [
            f"{k}:{n}:{s}:{odd}" for s in range(args.seeds) for n in args.labels for k in args.rows
        ]
    honest = [f"{k}:{n}:{s}" for s in range(args.seeds) for n in args.labels for k in args.rows]
    control = [f"{kind}:{SHUFFLED}:0:shuffled" for kind in args.rows if SHUFFLED in args.labels]
    return [*honest, *([] if args.validate else control)]


def row_file(args: argparse.Namespace, row: str) -> Path:
    """Return the file that keeps the scores of a row."""
    return Path(args.out, f"{row.replace(':', '-')}-{key(args, row)}.json")


def key(args: argparse.Namespace, row: str) -> str:
    """Return eight digits for the recipe of a row without its labels and seed."""
    return quality.digits(recipe(args, row.split(":")[0], 0, Path("labels.csv")))


def recipe(args: argparse.Namespace, kind: str, seed: int, labels: Path) -> Any:
    """Return the recipe of a row."""
    from deepclust import Recipe

    method, own = ARMS[kind]
    by_method, plain, shared = quality.DATA[args.data]
    name = plain if method == "deepcluster" else by_method.format(method)
    seeds = () if kind.startswith("mean-") else (f"seeds.labels={labels}", "seeds.per_class=null")
    more = quality.OWN.get(args.data, {}).get(method, [])
    where = f"data.shards={quality.shards(args)['train']}"
    chosen = Recipe.load(name, where, *shared, *more, *seeds, *own, *args.overrides)
    crops = sum(one.count for one in chosen.method.crops(chosen.data))
    epochs = max(1, (args.budget or BUDGET[args.data]) // crops)
    return chosen.replace(f"train.epochs={epochs}", f"seed={seed}")


def one_row(args: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracy of a row."""
    from deepclust import open_index

    kind, count, seed, *odd = args.row.split(":")
    index = open_index(quality.shards(args)["train"])
    ids, classes = drawn(np.asarray(index.labels), int(count), int(seed), odd == ["shuffled"])
    if args.without is not None:
        ids, classes = ids[classes != args.without], classes[classes != args.without]
    run = args.work / f"{args.data}-few-{args.row.replace(':', '-')}-{key(args, args.row)}"
    if kind.startswith("mean-"):  # one run for any labels
        run = args.work / f"{args.data}-few-{kind}-{seed}-{key(args, args.row)}"
    table = Path(f"{run}.csv")
    lines = [f"{index.keys[int(i)]},{c}" for i, c in zip(ids, classes, strict=True)]
    table.write_text("\n".join(["key,class", *lines]) + "\n")
    wanted = recipe(args, kind, int(seed), table)
    quality.train_run(wanted, run, shuffled=False)
    return score(args, kind, run, wanted, ids, classes)


def drawn(
    labels: np.ndarray, count: int, seed: int, shuffled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return samples and classes of `count` labels, equally many of each class, none held out."""
    from deepclust.world import generator

    draws = generator(seed, "bench", "few-labels", count)
    usable = np.arange(len(labels)) % quality.HELD_OUT != 0
    ids = np.concatenate(
        [
            draws.choice(np.flatnonzero(usable & (labels == c)), count // CLASSES, replace=False)
            for c in range(CLASSES)
        ]
    )
    classes = labels[ids]
    return ids, draws.permutation(classes) if shuffled else classes


def score(
    args: argparse.Namespace, kind: str, run: Path, wanted: Any, ids: Any, classes: Any
) -> dict[str, Any]:
    """Return the accuracy of what a run answers, or of nearest class means."""
    from cluster_jobs.results.evaluate import load_embedder
    from deepclust.evaluate.frozen import DIM, SeedRows, freeze
    from deepclust.evaluate.nearest_prototype import prototypes
    from deepclust.run.directory import Run

    embedder = load_embedder(Run(run))
    train, test = quality.embed_splits(args, embedder, wanted.data)
    if args.without is not None:
        return opened(Run(run), embedder, train, test)
    if not kind.startswith("mean-"):
        answers = embedder.answer(test[0]).numpy()[:, :CLASSES].argmax(1)
        return {"top1": float((answers == test[1]).mean())}
    if args.validate:  # the training rows are those of five images of six
        ids = ids - ids // quality.HELD_OUT - 1
    seeds = SeedRows(ids, classes)
    dim = wanted.cluster.dim if wanted.cluster else DIM
    return dict(prototypes(freeze(train, test, dim=dim, seeds=seeds)))


def opened(run: Any, embedder: Any, train: Any, test: Any) -> dict[str, Any]:
    """Return what the evaluator says of answers that may be a free prototype or cluster."""
    from deepclust.evaluate.classifier import classifier
    from deepclust.evaluate.frozen import Answers, freeze
    from deepclust.trained.answers import columns_of

    columns = columns_of(run, run.recipe, embedder.method)
    answers = Answers(embedder.answer, columns.classes, columns.class_of, columns.labels)
    scores = classifier(replace(freeze(train, test), answers=answers))
    return {name: value for name, value in scores if isinstance(value, float)}


def table(args: argparse.Namespace) -> str:
    """Return accuracy by kind and number of labels, as Markdown, or the open answers."""
    return labelled_table(args) if args.without is None else open_table(args)


def open_table(args: argparse.Namespace) -> str:
    """Return what was found of the class without a label, by kind and number of labels."""
    done = {row: json.loads(row_file(args, row).read_text()) for row in rows(args)}
    lines = [f"| class {args.without} unlabelled | " + " | ".join(OPEN) + " |", "|---" * 4 + "|"]
    for kind in args.rows:
        for n in args.labels:
            own = [done[r] for r in done if r.startswith(f"{kind}:{n}:")]
            cells = [quality.spread([one[name] for one in own], 3) for name in OPEN]
            lines.append(f"| {kind}, {n} labels | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def labelled_table(args: argparse.Namespace) -> str:
    """Return accuracy by kind and number of labels, as Markdown."""
    done = {row: json.loads(row_file(args, row).read_text())["top1"] for row in rows(args)}
    counts = [f"{n} labels" for n in args.labels]
    lines = [f"| {args.data} | " + " | ".join([*counts, "shuffled"]) + " |"]
    lines.append("|---" * (len(counts) + 2) + "|")
    for kind in args.rows:
        cells = [
            quality.spread([done[f"{kind}:{n}:{seed}"] for seed in range(args.seeds)], 3)
            for n in args.labels
        ]
        control = done.get(f"{kind}:{SHUFFLED}:0:shuffled")
        lines.append(f"| {kind} | " + " | ".join([*cells, f"{control:.3f}" if control else ""]))
    return "\n".join(f"{line} |" if not line.endswith("|") else line for line in lines)


if __name__ == "__main__":
    main()
