from __future__ import annotations

import numpy as np
import pytest

from deepclust.data import shuffle


def test_scrambling_is_a_bijection_and_comes_back():
    x = np.arange(1 << 16, dtype=np.uint32) * np.uint32(65537)
    scrambled = shuffle.scramble(x.copy(), key=3)
    assert len(np.unique(scrambled)) == len(x)
    np.testing.assert_array_equal(shuffle.unscramble(scrambled.copy(), key=3), x)
    assert (shuffle.scramble(x.copy(), key=4) != scrambled).mean() > 0.99


def test_the_order_sorts_by_group_and_is_random_inside():
    groups = np.random.default_rng(0).integers(0, 5, 4000).astype(np.uint32)
    ordered, order = shuffle.random_order(groups, len(groups), key=1)
    np.testing.assert_array_equal(ordered, np.sort(groups))
    np.testing.assert_array_equal(groups[order], ordered)
    np.testing.assert_array_equal(np.sort(order), np.arange(4000))
    inside = order[ordered == 3].astype(float)
    assert abs(np.corrcoef(inside[1:], inside[:-1])[0, 1]) < 0.15


def test_every_permutation_is_equally_likely():
    counts = np.zeros(24)
    for key in range(4800):
        order = shuffle.random_order(np.zeros(1, np.uint32), 4, key)[1]
        counts[rank(order)] += 1
    stats = pytest.importorskip("scipy.stats")
    assert stats.chisquare(counts).pvalue > 1e-3


def rank(order: np.ndarray) -> int:
    """The number of a permutation of four among the 24, in lexicographic order."""
    smaller = [(order[i + 1 :] < order[i]).sum() for i in range(4)]
    return int(np.dot(smaller, [6, 2, 1, 0]))


def test_nothing_and_one_item_have_an_order():
    assert len(shuffle.random_order(np.zeros(1, np.uint32), 0, 1)[1]) == 0
    assert shuffle.random_order(np.zeros(1, np.uint32), 1, 1)[1].tolist() == [0]
