"""Multinomial logistic regression on frozen, standardised features.

The published linear probes train a layer by SGD on augmented images. This one solves the convex
problem on features extracted once, as the evaluation of CLIP does (Radford et al. 2021, A.3). It
uses L-BFGS and chooses the strength of the L2 penalty on training rows held out, so there is no
learning rate to tune. Where there is a GPU and much to do, the same problem is solved there
(`logistic.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import threadpoolctl
import torch
from jaxtyping import Bool, Float, Int, Int64

from deepclust.errors import DataError
from deepclust.evaluate.device import choose_device, standardised
from deepclust.evaluate.frozen import Frozen, Value
from deepclust.evaluate.interval import with_interval
from deepclust.evaluate.logistic import Fit
from deepclust.world import generator

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

C_PATH = (0.01, 0.1, 1.0, 10.0)  # inverse strengths; from small to large each fit warms the next
TOLERANCE = 3e-4  # of the mean gradient: within 0.2 % top-1 of 1e-4 on Fashion-MNIST, 3x faster
MAX_ITERATIONS = 500


def linear(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield "top1" on the test rows, "C" (chosen on a tenth of the training rows) and "converged".

    The last is 0.0 where L-BFGS stopped at MAX_ITERATIONS. Raises `DataError` when there are
    fewer than two rows of each class on average, as none could then be held out.
    """
    train = frozen.train
    held_out = draw_held_out(train.labels, frozen.seed)
    device = choose_device(train.features.size * len(frozen.classes))
    solve = _on_cpu if device.type == "cpu" else functools.partial(on_device, device=device)
    right, strength, converged = solve(frozen, held_out)
    yield from with_interval("top1", right, frozen.seed)
    yield "C", strength
    yield "converged", float(converged)


def on_device(
    frozen: Frozen, held_out: Int64[np.ndarray, " h"], device: torch.device
) -> tuple[Bool[np.ndarray, " m"], float, bool]:
    """Return which test rows are right, C and whether the last fit converged, by the device."""
    classes, numbers = np.unique(frozen.train.labels, return_inverse=True)
    x, facts = standardised(frozen.train.features, device)
    y = torch.from_numpy(numbers.astype(np.int64)).to(device)
    places = torch.zeros(len(y), dtype=torch.bool)
    places[torch.from_numpy(held_out)] = True
    kept, out = ((places == flag).nonzero().flatten().to(device) for flag in (False, True))
    fit = Fit(torch.zeros(x.shape[1] + 1, len(classes), device=device))
    rows, targets = x[kept], y[kept]
    scores = {}
    for c in C_PATH:
        fit.run(rows, targets, c, TOLERANCE, MAX_ITERATIONS)
        scores[c] = fit.top1(x[out], y[out])
    del rows
    best = max(scores, key=lambda c: (scores[c], -c))
    fit.run(x, y, best, TOLERANCE, MAX_ITERATIONS)
    test, _ = standardised(frozen.test.features, device, facts)
    # a class without a training row cannot be answered: it counts as wrong
    known = np.searchsorted(classes, frozen.test.labels).clip(max=len(classes) - 1)
    known = np.where(classes[known] == frozen.test.labels, known, -1)
    right = fit.right(test, torch.from_numpy(known).to(device))
    return right.cpu().numpy(), best, fit.converged


def _on_cpu(
    frozen: Frozen, held_out: Int64[np.ndarray, " h"]
) -> tuple[Bool[np.ndarray, " m"], float, bool]:
    """Return which test rows are right, C and whether the last fit converged, by scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler, y = StandardScaler(), frozen.train.labels
    # float64 rows far from the origin are centred before they are narrowed
    x = scaler.fit_transform(_floats(frozen.train.features)).astype(np.float32, copy=False)
    test = scaler.transform(_floats(frozen.test.features)).astype(np.float32, copy=False)
    model = LogisticRegression(tol=TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True)
    # The matrices have as few columns as classes, where a threaded BLAS mostly waits: 60,000 x 256
    # took 2 s with one BLAS thread and 37 s with two on a busy machine of two cores.
    with threadpoolctl.threadpool_limits(1, "blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # "converged" reports it
        best = _choose_strength(model, x, y, held_out)
        model.set_params(C=best).fit(x, y)
        right = model.predict(test) == frozen.test.labels
    return right, best, bool(model.n_iter_.max() < MAX_ITERATIONS)


def _floats(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return features in float64 if they are, else in float32."""
    return np.asarray(features, np.float64 if features.dtype == np.float64 else np.float32)


def _choose_strength(
    model: LogisticRegression,
    x: Float[np.ndarray, "n d"],
    y: Int[np.ndarray, " n"],
    held_out: Int64[np.ndarray, " h"],
) -> float:
    """Return the smallest C of those with the best top-1 on the rows held out."""
    rest = np.setdiff1d(np.arange(len(y)), held_out)
    scores = {}
    for c in C_PATH:
        model.set_params(C=c).fit(x[rest], y[rest])
        scores[c] = model.score(x[held_out], y[held_out])
    return max(scores, key=lambda c: (scores[c], -c))


def draw_held_out(y: Int[np.ndarray, " n"], seed: int) -> Int64[np.ndarray, " h"]:
    """Return a random tenth of the rows, never the only row of a class."""
    classes, first = np.unique(y, return_index=True)
    if len(y) < 2 * len(classes):
        raise DataError(
            f"linear: {len(y)} training rows of {len(classes)} classes, and two of each class "
            "are needed to hold some out. Evaluate on more rows, or with `knn` alone."
        )
    free = np.setdiff1d(np.arange(len(y)), first)
    count = min(len(free), max(1, len(y) // 10))
    return generator(seed, "evaluate", "linear").choice(free, count, replace=False)
