"""Agreement without labels: against slow loops, what must be 0 or 1, too few or excluded images."""

from __future__ import annotations

import numpy as np
import pytest

from deepclust.errors import DataError
from deepclust.evaluate.agreement import (
    cosines,
    finds_other_crop,
    keeps_cluster,
    others_cosine,
    others_together,
    shared_neighbours,
)


def rows(seed: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


def test_means_over_pairs_are_those_of_slow_loops() -> None:
    a, b = rows(0), rows(1)
    length = np.linalg.norm
    loop = [[x @ y / length(x) / length(y) for y in b] for x in a]
    off = ~np.eye(len(a), dtype=bool)
    assert cosines(a, b) == pytest.approx(np.diag(loop), abs=1e-6)
    assert others_cosine(a, b) == pytest.approx(np.array(loop)[off].mean(), abs=1e-6)
    x, y = np.random.default_rng(2).integers(0, 3, (2, 40))
    assert others_together(x, y) == pytest.approx((x[:, None] == y)[off].mean())


def test_shared_neighbours_are_those_of_a_slow_loop() -> None:
    a, b = rows(0), rows(0) + 0.5 * rows(1)

    def near(x: np.ndarray, i: int) -> set[int]:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        order = np.argsort(-(unit @ unit[i]))
        return {int(j) for j in order if j != i} & set(order[order != i][:10].tolist())

    expected = [len(near(a, i) & near(b, i)) / 10 for i in range(len(a))]
    assert shared_neighbours(a, b) == pytest.approx(expected)
    assert 0.3 < np.mean(expected) < 0.95


def test_the_same_features_agree_wholly_and_a_rotation_changes_nothing() -> None:
    a = rows(3)
    turn, _ = np.linalg.qr(rows(4, 6))
    assert (shared_neighbours(a, a @ turn.astype(np.float32)) == 1).all()
    assert finds_other_crop(a, 2 * a).all()
    assert cosines(a, 3 * a) == pytest.approx(np.ones(40), abs=1e-6)
    assert np.array_equal(shared_neighbours(a, rows(5)), shared_neighbours(a, rows(5)))


def test_equal_rows_and_few_of_them_are_no_crash() -> None:
    same = np.ones((20, 3), np.float32)
    assert shared_neighbours(same, same).shape == (20,)
    with pytest.raises(DataError, match="11 images are too few"):
        shared_neighbours(rows(0, 11), rows(0, 11))


def test_renumbered_clusters_keep_their_images_and_excluded_ones_do_not_count() -> None:
    before = np.array([0, 0, 1, 1, 2, -1, 2])
    assert keeps_cluster(before, np.array([2, 2, 0, 0, 1, 1, -1])).tolist() == [True] * 5
    assert keeps_cluster(before, np.array([0, 1, 1, 1, 2, 2, 2])).mean() == 5 / 6
    with pytest.raises(DataError, match="both rounds"):
        keeps_cluster(np.array([-1, 0]), np.array([0, -1]))
