#!/usr/bin/env python3
"""Two moons with eight labels: what the terms of SuperCM do to a boundary.

    python tools/bench/two_moons.py                    8 seeds: a line for each row of the table
    python tools/bench/two_moons.py --picture two-moons.png

After Fig. 1 of SuperCM (Singh et al., Pattern Recognition 2025). The product's own method and terms
on points of the plane instead of images: a small network, Adam, all points in every step. Accuracy
is that of all points. Rows differ in their terms, and in whether the features end in a batch norm
without scale and shift.
"""

from __future__ import annotations

import argparse
import statistics
import sys
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

POINTS, LABELS, NOISE, STEPS, RATE = 200, 4, 0.1, 400, 0.01
CM, VAT = {"cm": {"weight": 1.0}}, {"vat": {"weight": 1.0, "eps": 0.3}}
ROWS: dict[str, tuple[dict[str, dict[str, float]], bool]] = {  # terms; whether features are normed
    "labels alone": ({}, False),
    "labels alone, features normed": ({}, True),
    "cm": (CM, False),
    "cm, features normed": (CM, True),
    "vat": (VAT, True),
    "vat and cm": ({**VAT, "cm": {"weight": 0.1}}, True),
}
SHOWN = ("labels alone", "cm, features normed", "vat and cm")


def main() -> None:
    """Print the table, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--picture", type=Path, help="draw the first seed instead")
    args = parser.parse_args()
    if args.picture is not None:
        draw(args.picture, args.seeds[0])
        return
    for row in args.rows:
        scores = [accuracy(train(row, seed), seed) for seed in args.seeds]
        each = " ".join(f"{score:.3f}" for score in scores)
        print(f"{row:32}{statistics.mean(scores):.3f}   {each}", flush=True)


def moons(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [n, 2], their moons [n], and their labels [n], -1 for all but a few of each moon."""
    points, classes = make_moons(POINTS, noise=NOISE, random_state=seed)
    random, labels = np.random.default_rng(seed), np.full(POINTS, -1)
    for c in (0, 1):
        labels[random.choice(np.flatnonzero(classes == c), LABELS, replace=False)] = c
    return torch.from_numpy(points).float(), torch.from_numpy(classes), torch.from_numpy(labels)


def network(seed: int, norm: bool) -> Backbone:
    """Two hidden layers of 32, and 16 features."""
    torch.manual_seed(seed)
    layers = [nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)]
    last = [nn.BatchNorm1d(16, affine=False)] if norm else []
    return Backbone(nn.Sequential(*layers, *last), name="mlp", dim=16, image_size=1)


def train(row: str, seed: int) -> Method:
    """Train the method of a row on all points."""
    terms, norm = ROWS[row]
    sections = {name: section_of(name, TERMS, TermSection)(**terms[name]) for name in terms}
    setting = Setting(Config(), None, seed, ALONE, sections, classes=("upper", "lower"))
    method = Method(network(seed, norm), setting).train()
    optimizer = torch.optim.Adam(method.parameters(), lr=RATE)
    points, _, labels = moons(seed)
    ids, none = torch.arange(POINTS), torch.zeros(0, POINTS, dtype=torch.int64)
    for step in range(STEPS):
        batch = Batch(ids, (points,), torch.zeros_like(ids), none, labels, Now(step, step))
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
    return method.eval()


@torch.no_grad()
def answers(method: Method, points: Tensor) -> Tensor:
    """The probability of the second moon, [n]."""
    return method.classify(method.backbone(points)).softmax(1)[:, 1]


def accuracy(method: Method, seed: int) -> float:
    """The share of all points that are in the moon that the method says."""
    points, classes, _ = moons(seed)
    return float(((answers(method, points) > 0.5) == classes).float().mean())


def draw(file: Path, seed: int) -> None:
    """Draw points, labels and boundaries of some rows, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points, classes, labels = moons(seed)
    x, y = np.meshgrid(np.linspace(-1.5, 2.5, 160), np.linspace(-1, 1.5, 100))
    plane = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1)).float()
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(9, 2.4), dpi=80)
    for axis, row in zip(axes, SHOWN, strict=True):
        method = train(row, seed)
        axis.contourf(x, y, answers(method, plane).view(x.shape), 8, cmap="RdBu", alpha=0.6)
        axis.scatter(*points.T, c=classes, cmap="RdBu", s=4)
        known = labels >= 0
        axis.scatter(*points[known].T, c="black", s=40, marker="*")
        axis.set_title(f"{row}: {accuracy(method, seed):.3f}", fontsize=9)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
