"""Nearest neighbours: against scikit-learn, whatever the tiles, and with next to no rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from deepclust.evaluate.frozen import Labelled, freeze
from deepclust.evaluate.knn import knn, nearest
from tests.evaluate.blobs import splits


def top1(train: Labelled, test: Labelled, **options: float) -> float:
    return dict(knn(freeze(train, test), **options))["top1"]


def test_top1_is_that_of_scikit_learn_with_the_same_weights() -> None:
    train, test = splits(1000, noise=1.5)
    reference = KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(*train)
    assert 0.3 < reference.score(*test) < 0.98
    assert top1(train, test) == pytest.approx(reference.score(*test), abs=1e-12)


def test_a_low_temperature_lets_the_nearest_neighbour_decide() -> None:
    train, test = splits(500, noise=1.5)
    nearest_only = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(*train)
    assert top1(train, test, temperature=0.002) == nearest_only.score(*test)
    assert top1(train, test) != nearest_only.score(*test)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(7, 5, generator=generator), torch.randn(90, 5, generator=generator)
    whole, ids = nearest(queries, rows, 20)
    monkeypatch.setitem(nearest.__globals__, "TRAIN_ROWS", 13)
    tiled, tiled_ids = nearest(queries, rows, 20)
    assert torch.equal(ids, tiled_ids)
    torch.testing.assert_close(whole, tiled)
    assert torch.equal(ids, (queries @ rows.T).argsort(dim=1, descending=True)[:, :20])


def test_length_of_a_row_does_not_count() -> None:
    (x, y), test = splits(300, noise=1.5)
    scale = np.random.default_rng(0).uniform(0.1, 100, (len(x), 1)).astype(np.float32)
    assert top1((x * scale, y), test) == top1((x, y), test)


def test_half_precision_rows_and_sparse_class_numbers_are_fine() -> None:
    (x, y), (tx, ty) = splits(300)
    names = np.array([3, 7, 100, 5000])
    shifted = top1((x.astype(np.float16), names[y]), (tx.astype(np.float16), names[ty]))
    assert shifted == top1((x, y), (tx, ty)) > 0.9


def test_computing_twice_gives_the_same_number() -> None:
    train, test = splits(300, noise=2.0)
    assert top1(train, test) == top1(train, test)


def test_fewer_rows_than_neighbours_all_vote() -> None:
    train = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    test = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]], np.float32), np.array([0, 1, 1])
    assert top1(train, test) == 1.0  # the zero row is as near to all: two votes to one


def test_a_class_that_training_never_saw_counts_as_wrong() -> None:
    train, (x, y) = splits(200, noise=0.1)
    assert top1(train, (x, np.full_like(y, 9))) == 0.0
