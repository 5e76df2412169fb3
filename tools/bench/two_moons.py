#!/usr/bin/env python3
"""Two moons with a few labels each: what the terms of SuperCM do to a boundary.

    python tools/bench/two_moons.py            8 seeds on one core, 4 minutes: two tables, and JSON
    python tools/bench/two_moons.py --picture two-moons.png

After Fig. 1 of SuperCM (Singh et al., Pattern Recognition 2025). The product's own method and terms
on points of the plane instead of images: a small network, Adam, all points in every step. Accuracy
is that of all points. Rows differ in their terms, and in whether the features end in a batch norm
without scale and shift. Each row has its own weight of cm. Settings were chosen on seeds from 100
on. Tables have seeds 0 to 7.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deepclust.methods.base import Batch, Now, Setting
from deepclust.methods.supervised.config import Config
from deepclust.methods.supervised.method import Method
from deepclust.methods.terms import TERMS
from deepclust.models.backbone import Backbone
from deepclust.recipe.named import section_of
from deepclust.recipe.sections import TermSection
from deepclust.world import ALONE

NOISE, RATE, LAYERS = 0.08, 0.01, 3


@dataclass(frozen=True)
class Setup:
    """How many points in all, labels of each moon, units of a layer, steps; cm's weight by row."""

    points: int
    labels: int
    width: int
    steps: int
    cm: Mapping[str, float]


SETUPS = {
    "few": Setup(1600, 3, 10, 1000, {"cm": 10.0, "cm, features normed": 2.0, "vat and cm": 0.2}),
    "more": Setup(200, 6, 32, 1000, {"cm": 1.0, "cm, features normed": 1.0, "vat and cm": 1.0}),
}
ROWS = {  # terms, and whether features are normed
    "labels alone": ((), False),
    "labels alone, features normed": ((), True),
    "cm": (("cm",), False),
    "cm, features normed": (("cm",), True),
    "vat": (("vat",), False),
    "vat and cm": (("vat", "cm"), False),
}
SHOWN = ("labels alone", "cm, features normed", "vat and cm")


def main() -> None:
    """Print the table, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--picture", type=Path, help="draw the first seed instead")
    parser.add_argument("--out", type=Path, default=Path("runs/two-moons.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # small networks: more threads wait for one another
    if args.picture is not None:
        draw(args.picture, args.seeds[0], SETUPS[args.setups[-1]])
        return
    tables = {name: table(name, args.rows, args.seeds) for name in args.setups}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"seeds": args.seeds, **tables}, indent=1))


def table(setup: str, rows: list[str], seeds: list[int]) -> dict[str, list[float]]:
    """Print the accuracies of a setup row by row, and return them."""
    print(f"{setup}: {SETUPS[setup]}")
    scores = {}
    for row in rows:
        scores[row] = [accuracy(train(row, seed, SETUPS[setup])) for seed in seeds]
        each = " ".join(f"{score:.3f}" for score in scores[row])
        print(f"{row:32}{statistics.mean(scores[row]):.3f}   {each}", flush=True)
    return scores


@dataclass(frozen=True)
class Trained:
    """A method after its training, the points [n, 2], their moons [n] and labels [n]."""

    method: Method
    points: Tensor
    classes: Tensor
    labels: Tensor


def moons(seed: int, setup: Setup) -> tuple[Tensor, Tensor, Tensor]:
    """Points [n, 2], their moons [n], and their labels [n], -1 for all but a few of each moon."""
    points, classes = make_moons(setup.points, noise=NOISE, random_state=seed)
    random, labels = np.random.default_rng(seed), np.full(setup.points, -1)
    for c in (0, 1):
        labels[random.choice(np.flatnonzero(classes == c), setup.labels, replace=False)] = c
    return torch.from_numpy(points).float(), torch.from_numpy(classes), torch.from_numpy(labels)


def network(seed: int, width: int, norm: bool) -> Backbone:
    """Three hidden layers, the last of which are the features."""
    torch.manual_seed(seed)
    sides = [2, *[width] * LAYERS]
    hidden = [part for i in range(LAYERS) for part in (nn.Linear(*sides[i : i + 2]), nn.ReLU())]
    last = [nn.BatchNorm1d(width, affine=False)] if norm else []
    return Backbone(nn.Sequential(*hidden, *last), name="mlp", dim=width, image_size=1)


def train(row: str, seed: int, setup: Setup) -> Trained:
    """Train the method of a row on all points."""
    terms, norm = ROWS[row]
    keys = {"cm": {"weight": setup.cm.get(row, 0.0)}, "vat": {"weight": 1.0, "eps": 0.3}}
    sections = {name: section_of(name, TERMS, TermSection)(**keys[name]) for name in terms}
    setting = Setting(Config(), None, seed, ALONE, sections, classes=("upper", "lower"))
    method = Method(network(seed, setup.width, norm), setting).train()
    optimizer = torch.optim.Adam(method.parameters(), lr=RATE)
    points, classes, labels = moons(seed, setup)
    ids, none = torch.arange(len(points)), torch.zeros(0, len(points), dtype=torch.int64)
    for step in range(setup.steps):
        batch = Batch(ids, (points,), torch.zeros_like(ids), none, labels, Now(step, step))
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
    return Trained(method.eval(), points, classes, labels)


@torch.no_grad()
def answers(method: Method, points: Tensor) -> Tensor:
    """The probability of the second moon, [n]."""
    return method.classify(method.backbone(points)).softmax(1)[:, 1]


def accuracy(of: Trained) -> float:
    """The share of all points that are in the moon that the method says."""
    return float(((answers(of.method, of.points) > 0.5) == of.classes).float().mean())


def draw(file: Path, seed: int, setup: Setup) -> None:
    """Draw points, labels and boundaries of some rows, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = np.meshgrid(np.linspace(-1.5, 2.5, 160), np.linspace(-1, 1.5, 100))
    plane = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1)).float()
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(9, 2.4), dpi=80)
    for axis, row in zip(axes, SHOWN, strict=True):
        of = train(row, seed, setup)
        axis.contourf(x, y, answers(of.method, plane).view(x.shape), 8, cmap="RdBu", alpha=0.6)
        axis.scatter(*of.points.T, c=of.classes, cmap="RdBu", s=4)
        axis.scatter(*of.points[of.labels >= 0].T, c="black", s=40, marker="*")
        axis.set_title(f"{row}: {accuracy(of):.3f}", fontsize=9)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
