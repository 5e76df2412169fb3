"""Images of several classes each: one linear probe for every class, and mean average precision.

The protocol is that of Goyal et al., "Scaling and benchmarking self-supervised visual
representation learning", 2019, 6.1, on VOC07. A linear classifier tells each class from the rest on
frozen features. Theirs are SVMs, and these are logistic regressions. One strength of the penalty
serves all classes, chosen by mean average precision on training rows held out. Labels are sets of
classes (`deepclust/data/label_sets.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from deepclust.data.label_sets import is_set, names_in
from deepclust.evaluate.average_precision import Ranking, area, mean_interval, voc07
from deepclust.evaluate.device import choose_device, standardised
from deepclust.evaluate.frozen import Frozen, Skipped, Table, Value
from deepclust.evaluate.interval import INTERVAL
from deepclust.evaluate.linear import C_PATH, MAX_ITERATIONS, TOLERANCE
from deepclust.evaluate.logistic import Fit
from deepclust.world import generator

FEWEST = 10  # training images, of which a tenth is held out
NO_SETS = (
    "no label names several classes. Write them with | between, as cat|dog, or as a list in "
    "KEY.json (data.labels=json.KEY)"
)


@dataclass
class OneVsRest(Fit):
    """A logistic regression of each class against the rest; targets are rows of `sets` [s, c]."""

    sets: Float32[Tensor, "s c"] = field(default_factory=lambda: torch.zeros(0, 0))

    def objective(self, x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Return the sum over classes of mean loss plus penalty, and its gradient."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        gradient = torch.zeros_like(self.weights, dtype=torch.float64)
        for tile in self._tiles(x):
            rows, wanted = x[tile], self.sets[y[tile]]
            logits = self.scores(rows)
            losses = torch.nn.functional.softplus(logits) - wanted * logits
            total += losses.double().sum()
            apart = logits.sigmoid() - wanted
            gradient[:-1] += rows.T @ apart
            gradient[-1] += apart.sum(0)
        return self._penalised(total, gradient, len(x), strength)

    def scores(self, x: Float32[Tensor, "n d"]) -> Float32[Tensor, "n c"]:
        """Return the logit of every class."""
        return torch.addmm(self.weights[-1], x, self.weights[:-1])


def multi_label(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield "map" and "map_voc07" of the test images, "chance", "C", "converged" and "classes".

    "map" is the mean area of the classes, with a bootstrap over images. "chance" is the mean share
    of images of a class, which scores that say nothing reach. "classes" has a row for each class,
    None where no test image is of it: such classes are left out of the means. Raises `Skipped`
    where no label names several classes, and for fewer than FEWEST training images.
    """
    classes, sets = sets_of(frozen)
    device = choose_device(frozen.train.features.size * len(classes))
    scores, strength, converged = _fitted(frozen, sets, device)
    truth = sets[frozen.test.labels]
    known = np.flatnonzero(truth.any(0))
    if len(known) == 0:
        raise Skipped("no test image is of a class")
    rankings = [Ranking.of(scores[:, c], truth[:, c]) for c in known]
    curves = [one.curve() for one in rankings]
    areas = np.array([area(*one)[0] for one in curves])
    points = np.array([voc07(*one)[0] for one in curves])
    yield "map", float(areas.mean())
    yield INTERVAL, [*mean_interval(rankings, frozen.seed)]
    yield "map_voc07", float(points.mean())
    yield "chance", float(truth[:, known].mean())
    yield "C", strength
    yield "converged", float(converged)
    yield "classes", _table(classes, truth, sets[frozen.train.labels], known, areas, points)


def sets_of(frozen: Frozen) -> tuple[list[str], Bool[np.ndarray, "s c"]]:
    """Return the classes that labels name, and of each label which of these, or raise `Skipped`."""
    if not any(map(is_set, frozen.classes)):
        raise Skipped(NO_SETS)
    if len(frozen.train.labels) < FEWEST:
        raise Skipped(f"{len(frozen.train.labels)} training images are fewer than {FEWEST}")
    names = [names_in(text) for text in frozen.classes]
    classes = sorted({name for own in names for name in own})
    places = {name: place for place, name in enumerate(classes)}
    sets = np.zeros((len(names), len(classes)), bool)
    for row, own in enumerate(names):
        sets[row, [places[name] for name in own]] = True
    return classes, sets


def _fitted(
    frozen: Frozen, sets: Bool[np.ndarray, "s c"], device: torch.device
) -> tuple[Float32[np.ndarray, "m c"], float, bool]:
    """Return test scores of all classes, C, and whether the last fit converged."""
    x, facts = standardised(frozen.train.features, device)
    y = torch.from_numpy(frozen.train.labels).to(device)
    table = torch.from_numpy(sets.astype(np.float32)).to(device)
    fit = OneVsRest(torch.zeros(x.shape[1] + 1, sets.shape[1], device=device), sets=table)
    out, kept = (torch.from_numpy(rows).to(device) for rows in _held_out(len(y), frozen.seed))
    truth = sets[frozen.train.labels[out.cpu().numpy()]]
    values = {}
    for c in C_PATH:
        fit.run(x[kept], y[kept], c, TOLERANCE, MAX_ITERATIONS)
        values[c] = _mean_area(fit.scores(x[out]).cpu().numpy(), truth)
    best = max(values, key=lambda c: (values[c], -c))
    fit.run(x, y, best, TOLERANCE, MAX_ITERATIONS)
    test, _ = standardised(frozen.test.features, device, facts)
    return fit.scores(test).cpu().numpy(), best, fit.converged


def _mean_area(scores: Float32[np.ndarray, "m c"], truth: Bool[np.ndarray, "m c"]) -> float:
    """Return mean average precision over the classes that there are, 0 without any."""
    known = np.flatnonzero(truth.any(0))
    areas = [area(*Ranking.of(scores[:, c], truth[:, c]).curve())[0] for c in known]
    return float(np.mean(areas)) if areas else 0.0


def _held_out(n: int, seed: int) -> tuple[Int64[np.ndarray, " h"], Int64[np.ndarray, " k"]]:
    """Return a random tenth of the rows, and the others."""
    order = generator(seed, "evaluate", "multi-label").permutation(n)
    return np.sort(order[: n // 10]), np.sort(order[n // 10 :])


def _table(
    classes: list[str],
    truth: Bool[np.ndarray, "m c"],
    train: Bool[np.ndarray, "n c"],
    known: Int64[np.ndarray, " k"],
    areas: np.ndarray,
    points: np.ndarray,
) -> Table:
    """Return average precisions and counts of images by class."""
    precisions = dict(zip(known.tolist(), zip(areas, points, strict=True), strict=True))
    values: list[list[float | None]] = []
    for place in range(len(classes)):
        own = precisions.get(place)
        both = [None, None] if own is None else [float(one) for one in own]
        values.append([*both, float(train[:, place].sum()), float(truth[:, place].sum())])
    columns = ["AP", "AP, 11 points", "training images", "test images"]
    return {"rows": classes, "columns": columns, "values": values}
