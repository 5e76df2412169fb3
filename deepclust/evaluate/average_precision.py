"""Average precision of one class, and its bootstrap: how well scores order the images of a class.

`area` is the sum of precisions weighted by steps of recall, as in scikit-learn. `voc07` is the mean
of the best precision at recalls of at least 0, 0.1, ..., 1. Its source is Everingham et al., "The
PASCAL visual object classes challenge", 2010, 4.2. Equal scores are one threshold.
Weights of images are counts of a resample, so that no row is drawn twice for a bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from deepclust.world import generator

RECALLS = np.arange(11) / 10
RESAMPLES, LEAST = 1000, 200
PRODUCTS = 2 * 10**8  # images x classes x resamples, which fewer resamples keep
HELD = 2**22  # weights at a time


@dataclass(frozen=True)
class Ranking:
    """Images from the highest score to the lowest, and where thresholds can lie."""

    order: Int64[np.ndarray, " n"]
    ends: Int64[np.ndarray, " t"]  # the last place of each run of equal scores
    positive: Bool[np.ndarray, " n"]  # in that order

    @classmethod
    def of(cls, scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Ranking:
        """Rank images by their scores of one class, higher first."""
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
        return cls(order, ends, positive[order])

    def curve(
        self, weights: Int64[np.ndarray, "r n"] | None = None
    ) -> tuple[Float64[np.ndarray, "r t"], Float64[np.ndarray, "r t"]]:
        """Return precision and recall at each threshold, for one row of weights or several.

        Recall is NaN where a row has no image of the class.
        """
        own = np.ones((1, len(self.order)), np.int64) if weights is None else weights
        own = own[:, self.order]
        total = own.cumsum(1)[:, self.ends]
        true = (own * self.positive).cumsum(1)[:, self.ends]
        with np.errstate(invalid="ignore"):
            return true / np.maximum(total, 1), true / true[:, -1:]


def area(
    precision: Float64[np.ndarray, "r t"], recall: Float64[np.ndarray, "r t"]
) -> Float64[np.ndarray, " r"]:
    """Return the area under curves of precision by recall."""
    values: Float64[np.ndarray, " r"] = (np.diff(recall, axis=1, prepend=0.0) * precision).sum(1)
    return values


def voc07(
    precision: Float64[np.ndarray, "r t"], recall: Float64[np.ndarray, "r t"]
) -> Float64[np.ndarray, " r"]:
    """Return the 11-point average precision of curves."""
    best = np.where(
        recall[:, None] >= RECALLS[:, None] - 1e-12, precision[:, None], 0.0
    )  # 0.3 of ten images is 3/10, which need not be above 0.3 in binary
    values: Float64[np.ndarray, " r"] = best.max(2).mean(1)
    return values


def mean_interval(
    rankings: list[Ranking], seed: int, resamples: int | None = None
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean area of several classes.

    A resample that has no image of a class leaves this class out, and one of none is left out.
    """
    n = len(rankings[0].order)
    count = resamples or int(np.clip(PRODUCTS // (n * len(rankings)), LEAST, RESAMPLES))
    random, means = generator(seed, "evaluate", "mAP"), []
    size = max(1, HELD // n)
    for start in range(0, count, size):
        drawn = [
            np.bincount(random.integers(n, size=n), minlength=n)
            for _ in range(min(size, count - start))
        ]
        weights = np.stack(drawn)
        areas = np.stack([area(*one.curve(weights)) for one in rankings])
        means.append(np.nanmean(areas[:, ~np.isnan(areas).all(0)], axis=0))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)
