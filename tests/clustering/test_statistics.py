"""Statistics of assignments against scikit-learn and SciPy, and the matching of ids."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from deepclust.clustering import match_ids
from deepclust.clustering.statistics import (
    accuracy,
    ari,
    describe,
    entropy,
    match,
    nmi,
    reassigned,
)

LABELS = st.integers(1, 80).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 6), min_size=n, max_size=n)] * 2)
)


@settings(max_examples=80, deadline=None)
@given(LABELS)
def test_nmi_and_ari_equal_scikit_learn(pair: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(labels) for labels in pair)
    theirs = normalized_mutual_info_score(a, b, average_method="geometric")
    assert nmi(a, b) == pytest.approx(theirs, abs=1e-7)
    assert ari(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(LABELS)
def test_matching_and_accuracy_equal_the_dense_hungarian(pair: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(labels) for labels in pair)
    table = np.zeros((7, 7), int)
    np.add.at(table, (b, a), 1)
    best = table[linear_sum_assignment(table, maximize=True)].sum()
    found = match(a, b, 7)
    assert sorted(found.new_ids) == list(range(7))
    assert table[np.arange(7), found.new_ids].sum() == best
    assert accuracy(b, a) == pytest.approx(best / len(a))
    assert reassigned(a, b, 7) == pytest.approx(1 - best / len(a))


def test_a_renumbering_is_found_and_nothing_was_reassigned() -> None:
    draws = np.random.default_rng(0)
    a, permutation = draws.integers(0, 50, 2000), draws.permutation(50)
    found = match(permutation[a], a, 50)
    np.testing.assert_array_equal(found.new_ids, permutation)
    assert found.overlapping.all()
    assert reassigned(permutation[a], a, 50) == 0.0


def test_clusters_without_overlap_are_unmatched_and_take_what_is_left() -> None:
    found = match(np.array([0, 0, 1, 1]), np.array([2, 2, 2, 2]), 3)
    assert found.new_ids[2] in (0, 1)
    assert found.overlapping.tolist() == [False, False, True]
    assert sorted(found.new_ids) == [0, 1, 2]


def test_greedy_takes_the_largest_overlap_first(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0)
    a, b = draws.integers(0, 30, 3000), draws.integers(0, 30, 3000)
    table = np.zeros((30, 30), int)
    np.add.at(table, (b, a), 1)
    expected = np.full(30, -1)
    for place in np.argsort(-table, axis=None, kind="stable"):
        row, column = divmod(int(place), 30)
        if expected[row] < 0 and column not in expected:
            expected[row] = column
    monkeypatch.setattr(match_ids, "EXACT_UP_TO", 10)
    np.testing.assert_array_equal(match(a, b, 30).new_ids, expected)


def test_excluded_samples_count_nowhere() -> None:
    a, b = np.array([0, 0, 1, 1, -1, 0]), np.array([1, 1, 0, 0, 0, -1])
    assert nmi(a, b) == pytest.approx(1.0)
    assert ari(a, b) == 1.0
    assert accuracy(a, b) == 1.0
    assert match(a, b, 2).new_ids.tolist() == [1, 0]
    assert reassigned(a, b, 2) == 0.0


def test_description_of_a_round() -> None:
    now = np.array([0, 0, 0, 1, 2, -1], np.int32)
    text = describe(now, 4, previous=np.array([1, 1, 1, 0, 0, 0]), classes=np.array([5] * 6))
    assert (text["n"], text["excluded"], text["k"]) == (6, 1, 4)
    assert text["sizes"] == {"min": 0, "median": 1.0, "max": 3}
    assert text["largest_share"] == pytest.approx(0.6)
    assert text["entropy"] == pytest.approx(-(0.6 * np.log(0.6) + 0.4 * np.log(0.2)))
    assert text["entropy_ratio"] == pytest.approx(text["entropy"] / np.log(4))
    assert text["reassigned"] == pytest.approx(0.2)
    assert text["accuracy_labels"] == pytest.approx(0.6)


def test_statistics_that_cannot_be_computed_are_none() -> None:
    text = describe(np.array([0, 1]), 2, classes=np.array([-1, -1]))
    assert text["nmi_labels"] is text["ari_labels"] is text["accuracy_labels"] is None
    assert text["nmi_previous"] is text["reassigned"] is None
    nothing = describe(np.array([-1, -1]), 2, previous=np.array([0, 1]))
    assert (nothing["entropy"], nothing["reassigned"]) == (0.0, None)


def test_entropy_of_equal_sizes_is_the_logarithm_of_their_number() -> None:
    assert entropy(np.full(8, 5)) == pytest.approx(np.log(8))
    assert entropy(np.array([0, 9])) == 0.0


def test_ten_thousand_clusters_take_about_a_second() -> None:
    draws = np.random.default_rng(0)
    a = draws.integers(0, 10_000, 300_000)
    b = np.where(draws.random(300_000) < 0.5, a, draws.integers(0, 10_000, 300_000))
    assert reassigned(a, b, 10_000) == pytest.approx(0.5, abs=0.02)


def test_the_size_of_an_id_costs_nothing_and_changes_nothing() -> None:
    draws = np.random.default_rng(0)
    clusters, classes = draws.integers(0, 9, 500), draws.integers(-1, 5, 500)
    far = np.where(classes < 0, -1, np.array([5, 70, 10**9 + 7, 2**31 - 2, 2**31 - 1])[classes])
    assert describe(clusters, 9, classes=far) == describe(clusters, 9, classes=classes)
    assert nmi(far, clusters) == nmi(classes, clusters)
    assert match_ids.contingency(far, far).shape == (5, 5)


def test_as_many_classes_as_samples_are_matched_without_a_dense_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = np.random.default_rng(0)
    clusters, classes = draws.integers(0, 30, 900), draws.integers(0, 200, 900)
    dense = accuracy(clusters, classes)
    monkeypatch.setattr("deepclust.clustering.statistics.DENSE", 10)
    assert accuracy(clusters, classes) == dense
    assert accuracy(classes, clusters) == dense
    monkeypatch.undo()
    many = np.arange(200_000)
    assert accuracy(many % 1000, many * 10_000) == 1000 / 200_000


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_pairs_counted_in_blocks_are_those_of_a_dense_table(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(match_ids, "BLOCK", block)
    a, b = np.random.default_rng(0).integers(-1, 9, (2, 500)).astype(np.int32)
    dense = np.zeros((10, 10), np.int64)
    both = (a >= 0) & (b >= 0)
    np.add.at(dense, (a[both], b[both]), 1)
    np.testing.assert_array_equal(match_ids.contingency(a, b, (10, 10)).toarray(), dense)
    none = match_ids.contingency(np.full(5, -1), np.zeros(5, int))
    assert none.shape == (0, 0)


def test_counting_pairs_takes_no_memory_for_each_sample() -> None:
    a = np.random.default_rng(0).integers(0, 50, 2**22).astype(np.int32)
    tracemalloc.start()
    match_ids.contingency(a, a)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * len(a)  # as one sort of all pairs would hold
