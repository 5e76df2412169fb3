"""The nearest class prototype: a slow reference, few labels, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from deepclust.clustering.whiten import Whitening
from deepclust.errors import DataError
from deepclust.evaluate.frozen import SeedRows, Skipped, freeze
from deepclust.evaluate.nearest_prototype import prototypes
from tests.evaluate.blobs import splits


def scores(
    seeds: np.ndarray, noise: float = 0.8, refine: float = 0.0, dim: int = 64
) -> dict[str, float]:
    train, test = splits(400, noise=noise)
    rows = SeedRows(seeds, train[1][seeds], refine)
    return dict(prototypes(freeze(train, test, dim=dim, seeds=rows)))


def test_scores_are_those_of_a_slow_reference() -> None:
    (x, y), (test_x, test_y) = splits(400, noise=2.0)
    seeds = np.random.default_rng(0).choice(400, 40, replace=False)
    whiten = Whitening.fit(x, 8)
    rows, probes = whiten(x[seeds]).astype(np.float64), whiten(test_x)
    means = np.stack([rows[y[seeds] == c].mean(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    right = (probes @ means.T).argmax(1) == test_y
    values = scores(seeds, noise=2.0, dim=8)
    assert 0.3 < values["top1"] < 0.99
    assert values["top1"] == pytest.approx(right.mean())
    recalls = [right[test_y == c].mean() for c in range(4)]
    assert values["recall"] == pytest.approx(np.mean(recalls))


def test_more_labels_help_and_wrong_ones_do_not() -> None:
    (x, y), test = splits(400, noise=1.5)
    few = np.array([int(np.flatnonzero(y == c)[0]) for c in range(4)])
    every = np.arange(400)
    assert scores(every, noise=1.5)["top1"] > scores(few, noise=1.5)["top1"]
    wrong = dict(prototypes(freeze((x, y), test, seeds=SeedRows(every, (y + 1) % 4))))
    assert wrong["top1"] < 0.1


def test_refining_by_the_rows_without_a_label_helps_few_labels() -> None:
    (_, y), _ = splits(400, noise=1.5)
    few = np.array([int(np.flatnonzero(y == c)[0]) for c in range(4)])
    assert scores(few, noise=1.5, refine=4)["top1"] > scores(few, noise=1.5)["top1"]


def test_classes_may_have_any_numbers_and_test_rows_classes_without_a_label() -> None:
    (x, y), (test_x, test_y) = splits(400, noise=0.05)
    seeds = np.flatnonzero(y < 2)
    y, test_y = y * 7 + 5, test_y * 7 + 5
    frozen = freeze((x, y), (test_x, test_y), seeds=SeedRows(seeds, y[seeds]))
    values = dict(prototypes(frozen))
    assert values["top1"] == pytest.approx((test_y < 2 * 7 + 5).mean())
    assert values["recall"] == pytest.approx(0.5)


def test_computing_twice_gives_the_same_numbers() -> None:
    seeds = np.arange(0, 400, 9)
    assert scores(seeds) == scores(seeds)


def test_no_label_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="no training row has a label"):
        scores(np.zeros(0, np.int64))


def test_without_seeds_it_is_skipped_with_the_reason() -> None:
    with pytest.raises(Skipped, match="no labelled seeds"):
        dict(prototypes(freeze(*splits(100))))
