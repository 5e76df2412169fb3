"""A linear probe trained by mini-batch SGD, all learning rates at once, on the device.

That is how the published probes are trained, here on frozen features without augmentation. The
weights of all rates lie side by side, so a batch is read once for all of them. The rate is chosen
on training rows held out, as C is in `linear.py`, and a second training uses all rows. Rates fall
to 0 by a cosine. Momentum is 0.9, without weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from deepclust.evaluate.device import choose_device, standardised
from deepclust.evaluate.frozen import Frozen, Value
from deepclust.evaluate.interval import with_interval
from deepclust.evaluate.linear import draw_held_out
from deepclust.world import generator

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS = 30
BATCH = 256
MOMENTUM = 0.9
LOGITS = 2**24  # numbers that are held at a time when rows are answered


def linear_sgd(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield "top1" on the test rows, and "lr", chosen on a tenth of the training rows.

    Raises `DataError` when there are fewer than two rows of each class on average.
    """
    train, test = frozen.train, frozen.test
    held_out = draw_held_out(train.labels, frozen.seed)
    classes, numbers = np.unique(train.labels, return_inverse=True)
    device = choose_device(train.features.size * len(classes) * EPOCHS)
    x, facts = standardised(train.features, device)
    y = torch.from_numpy(numbers.astype(np.int64)).to(device)
    kept = np.setdiff1d(np.arange(len(y)), held_out)
    weights = fit(x, y, kept, RATES, len(classes), frozen.seed)
    out = torch.from_numpy(held_out).to(device)
    scores = right(weights, x[out], y[out]).double().mean(1)
    best = int(scores.argmax())  # of equals the lowest rate
    weights = fit(x, y, np.arange(len(y)), RATES[best : best + 1], len(classes), frozen.seed)
    rows, _ = standardised(test.features, device, facts)
    # a class without a training row cannot be answered: it counts as wrong
    known = np.searchsorted(classes, test.labels).clip(max=len(classes) - 1)
    known = np.where(classes[known] == test.labels, known, -1)
    answers = right(weights, rows, torch.from_numpy(known).to(device))[0]
    yield from with_interval("top1", answers.cpu().numpy(), frozen.seed)
    yield "lr", RATES[best]


def fit(
    x: Float32[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    kept: Int64[np.ndarray, " m"],
    rates: tuple[float, ...],
    classes: int,
    seed: int,
) -> Float32[Tensor, "r e c"]:
    """Train on the rows `kept` and return the weights of each rate; the last row is the bias.

    No step waits for a GPU: an epoch's order is sent at once.
    """
    weights = torch.zeros(len(rates), x.shape[1] + 1, classes, device=x.device)
    speed, steps = torch.zeros_like(weights), EPOCHS * -(-len(kept) // BATCH)
    given, step = torch.tensor(rates, device=x.device)[:, None, None], 0
    for epoch in range(EPOCHS):
        order = generator(seed, "evaluate", "linear_sgd", epoch).permutation(kept)
        for places in torch.split(torch.from_numpy(order).to(x.device), BATCH):
            speed = MOMENTUM * speed + gradient(weights, x[places], y[places])
            weights -= given * (0.5 + 0.5 * math.cos(math.pi * step / steps)) * speed
            step += 1
    return weights


def gradient(
    weights: Float32[Tensor, "r e c"], x: Float32[Tensor, "b d"], y: Int64[Tensor, " b"]
) -> Float32[Tensor, "r e c"]:
    """Return the gradients of the mean cross-entropy by the weights of each rate."""
    apart = torch.softmax(_logits(weights, x), 2)
    apart[:, torch.arange(len(y), device=y.device), y] -= 1
    apart /= len(y)
    return torch.cat([x.T @ apart, apart.sum(1, keepdim=True)], 1)


def right(
    weights: Float32[Tensor, "r e c"], x: Float32[Tensor, "n d"], y: Int64[Tensor, " n"]
) -> Bool[Tensor, "r n"]:
    """Return which rows' likeliest class is theirs, for each rate."""
    size = max(1, LOGITS // (len(weights) * weights.shape[2]))
    pieces = zip(torch.split(x, size), torch.split(y, size), strict=True)
    return torch.cat([_logits(weights, rows).argmax(2) == own for rows, own in pieces], 1)


def _logits(weights: Tensor, x: Tensor) -> Float32[Tensor, "r b c"]:
    return torch.baddbmm(weights[:, -1:], x.expand(len(weights), *x.shape), weights[:, :-1])
