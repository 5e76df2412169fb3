"""Prototypes: a slow reference, exact sums, moving averages over turned spaces, and the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.class_prototypes import (
    Prototypes,
    average,
    carry_over,
    class_prototypes,
    nearest_of_class,
    refine,
    score_seeds,
    start_from_prototypes,
)
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.options import KMeansOptions
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.clustering.whiten import Whitening
from deepclust.errors import NumericalError
from deepclust.world import World
from tests.ranks import on_ranks

NAMES = ["ant", "bee", "cat"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(n: int = 400, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Whitened rows as a run has them: unit, float16."""
    return unit(np.random.default_rng(seed).normal(size=(n, dim)) + 0.3).astype(np.float16)


def labels(n: int = 400) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3, n).astype(np.int32)


def whitening(dim: int = 4, seed: int = 0) -> Whitening:
    x = np.random.default_rng(seed).normal(size=(500, 9)) * np.arange(1, 10)
    return Whitening.fit(x.astype(np.float32), dim)


def given(x: np.ndarray, class_of: list[int] | None = None) -> Prototypes:
    owners = np.arange(len(x)) if class_of is None else np.array(class_of)
    return Prototypes(
        unit(x).astype(np.float32), owners.astype(np.int32), np.ones(len(x), np.int64)
    )


def test_a_prototype_is_the_unit_mean_of_its_class() -> None:
    x, y = rows(), labels()
    found = class_prototypes(ArrayPoints(x), y, NAMES)
    wide = unit(x.astype(np.float64))
    expected = unit(np.stack([wide[y == c].mean(0) for c in range(3)]))
    np.testing.assert_allclose(found.rows, expected, atol=1e-6)
    np.testing.assert_array_equal(found.counts, np.bincount(y))
    assert found.class_of.tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, atol=1e-6)


def test_the_order_of_rows_changes_no_bit() -> None:
    x, y = rows(), labels()
    order = np.random.default_rng(2).permutation(len(x))
    one = class_prototypes(ArrayPoints(x), y, NAMES)
    other = class_prototypes(ArrayPoints(x[order]), y[order], NAMES)
    np.testing.assert_array_equal(one.rows, other.rows)


def test_a_class_whose_rows_cancel_is_named() -> None:
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 2]]
    x[3] *= -1
    y = np.array([0, 1, 2, 2], np.int32)
    with pytest.raises(NumericalError, match="2 labelled rows of class 'cat' cancel"):
        class_prototypes(ArrayPoints(x), y, NAMES)


def test_several_prototypes_are_spherical_k_means_inside_the_class() -> None:
    x, y = rows(), labels()
    found = class_prototypes(ArrayPoints(x), y, NAMES, each=4)
    assert found.class_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.counts.reshape(3, 4).sum(1).tolist() == np.bincount(y).tolist()
    np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, atol=1e-6)
    own = found.rows[4:8] @ unit(x[y == 1].astype(np.float64)).T
    mean = class_prototypes(ArrayPoints(x), y, NAMES).rows[1] @ unit(x[y == 1].astype(np.float64)).T
    assert own.max(0).mean() > mean.mean() + 0.05


def test_a_class_with_few_distinct_rows_has_fewer_prototypes() -> None:
    x = rows(20)
    x[:6], x[6:8] = x[0], x[6]
    y = np.array([0] * 6 + [1] * 4 + [2] * 10, np.int32)
    found = class_prototypes(ArrayPoints(x), y, NAMES, each=5)
    assert np.bincount(found.class_of).tolist() == [1, 3, 5]
    assert found.counts.tolist()[0] == 6


def pinned(world: World, x: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    own = ArrayPoints(np.array_split(x, world.size)[world.rank])
    return kmeans(ShardedPoints(own, world), 20, fixed=fixed, spherical=True).centroids


def test_pinned_prototypes_keep_every_bit_on_sharded_half_precision_rows() -> None:
    x, y = rows(), labels()
    fixed = class_prototypes(ArrayPoints(x), y, NAMES, each=2).rows
    alone = kmeans(x, 20, fixed=fixed, spherical=True).centroids
    assert alone[:6].tobytes() == fixed.tobytes()
    for part in on_ranks(2, pinned, x, fixed):
        assert part.tobytes() == alone.tobytes()


def test_refined_prototypes_are_those_of_a_slow_reference() -> None:
    x, y = rows(), labels()
    begun = class_prototypes(ArrayPoints(x), y, NAMES)
    wide, near = unit(x.astype(np.float64)), begun.rows.astype(np.float64)
    for _ in range(2):
        own = (wide @ near.T).argmax(1)
        centres = np.stack([unit(wide[own == c].sum(0)) for c in range(3)])
        near = unit(begun.counts[:, None] * begun.rows + 50.0 * centres)
    found = refine(ArrayPoints(x), begun, 50.0, passes=2)
    np.testing.assert_allclose(found.rows, near, atol=1e-5)
    np.testing.assert_array_equal(found.counts, begun.counts)
    assert np.abs(found.rows - begun.rows).max() > 0.01


def test_refining_by_all_rows_mends_the_prototypes_of_few_labels() -> None:
    draws = np.random.default_rng(3)
    centres = unit(draws.normal(size=(3, 12)))
    truth = draws.integers(0, 3, 3000)
    x = unit(centres[truth] + 0.3 * draws.normal(size=(3000, 12)))
    few = np.array([int(np.flatnonzero(truth == c)[0]) for c in range(3)])
    begun = class_prototypes(ArrayPoints(x[few]), truth[few].astype(np.int32), NAMES)
    near, far = ((p.rows * centres).sum(1) for p in (refine(ArrayPoints(x), begun, 4.0), begun))
    assert (near > far + 0.02).all()


def refined_rows(world: World, x: np.ndarray, begun: Prototypes) -> np.ndarray:
    own = ArrayPoints(np.array_split(x, world.size)[world.rank])
    return refine(ShardedPoints(own, world), begun, 4.0).rows


def test_refined_prototypes_have_the_same_bits_on_any_number_of_ranks() -> None:
    x = rows()
    begun = class_prototypes(ArrayPoints(x), labels(), NAMES, each=2)
    alone = refine(ArrayPoints(x), begun, 4.0).rows
    for size in (2, 3):
        for part in on_ranks(size, refined_rows, x, begun):
            assert part.tobytes() == alone.tobytes()


def test_a_prototype_that_no_row_is_near_stays() -> None:
    x = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    begun = given(np.eye(4)[[0, 3]])
    assert refine(ArrayPoints(x[:2]), begun, 4.0).rows.tobytes() == begun.rows.tobytes()


def test_equal_whitenings_carry_prototypes_to_themselves() -> None:
    p = given(np.random.default_rng(3).normal(size=(5, 4))).rows
    np.testing.assert_allclose(carry_over(p, whitening(), whitening()), p, atol=1e-5)


def test_carried_prototypes_follow_flipped_and_swapped_axes() -> None:
    p, one = given(np.random.default_rng(3).normal(size=(5, 4))).rows, whitening()
    swap, signs = [2, 0, 1, 3], np.array([1, -1, -1, 1], np.float32)
    matrix = np.ascontiguousarray(one.matrix[:, swap] * signs)
    other = Whitening(one.mean, matrix, one.eigenvalues[swap], one.rank)
    np.testing.assert_allclose(carry_over(p, one, other), p[:, swap] * signs, atol=1e-5)


def test_carried_rows_are_those_of_the_same_features() -> None:
    x = np.random.default_rng(4).normal(size=(300, 6)).astype(np.float32)
    turned = Whitening.fit(x @ np.diag([1, 2, 1, 3, 1, 1]).astype(np.float32) * 2, 6)
    full = Whitening.fit(x, 6)
    centred = x[:9] - full.mean
    expected = unit(centred.astype(np.float64) @ turned.matrix)
    np.testing.assert_allclose(
        carry_over(unit(centred @ full.matrix), full, turned), expected, atol=1e-4
    )


def test_dead_directions_carry_nothing_and_no_nan() -> None:
    flat = np.random.default_rng(0).normal(size=(300, 2)) @ np.eye(2, 9)
    dead = Whitening.fit(flat.astype(np.float32), 4)
    assert dead.rank == 2
    p = given(np.eye(4)[[0, 2]]).rows
    moved = carry_over(p, dead, dead)
    np.testing.assert_allclose(moved, [[1, 0, 0, 0], [0, 0, 0, 0]], atol=1e-5)
    old, new = given(np.eye(4)[[0, 2]]), given(np.eye(4)[[1, 1]])
    mixed = average(new, old, dead, dead, 0.5)
    np.testing.assert_array_equal(mixed.rows[1], new.rows[1])  # nothing to average with


def test_the_average_is_that_of_the_formula() -> None:
    random = np.random.default_rng(5)
    old, new = (given(random.normal(size=(3, 4))) for _ in range(2))
    found = average(new, old, whitening(), whitening(), 0.7)
    expected = unit(0.7 * old.rows + 0.3 * new.rows.astype(np.float64))
    np.testing.assert_allclose(found.rows, expected, atol=1e-5)
    same = average(new, old, whitening(), whitening(), 0.0)
    np.testing.assert_array_equal(same.rows, new.rows)


def test_several_prototypes_take_the_place_of_their_nearest_predecessor() -> None:
    x = np.random.default_rng(6).normal(size=(6, 4))
    old = given(x, [0, 0, 0, 1, 1, 1])
    order = [2, 0, 1, 4, 5]  # shuffled inside the classes; class 1 has lost one
    new = given(x[order] + 0.01, [0, 0, 0, 1, 1])
    found = average(new, old, whitening(), whitening(), 0.9)
    np.testing.assert_allclose(found.rows[:3], old.rows[:3], atol=0.05)
    np.testing.assert_allclose(found.rows[3:], old.rows[[4, 5]], atol=0.05)


def test_released_k_means_starts_from_the_prototypes_and_distinct_rows() -> None:
    x, y = rows(), labels()
    found = class_prototypes(ArrayPoints(x), y, NAMES)
    start = start_from_prototypes(ArrayPoints(x), found, KMeansOptions(10))
    np.testing.assert_array_equal(start[:3], found.rows)
    assert len(np.unique(start, axis=0)) == 10
    moved = kmeans(x, 10, init=start, spherical=True).centroids
    assert (moved[:3] != found.rows).any(1).all()


def test_claimed_samples_take_the_nearest_cluster_of_their_class() -> None:
    x, y = rows(), labels()
    centroids = unit(np.random.default_rng(7).normal(size=(9, 12))).astype(np.float32)
    class_of = np.array([0, 0, 1, 2, 2, 2], np.int32)
    targets, distances = nearest_of_class(ArrayPoints(x), y, class_of, centroids)
    table = ((unit(x.astype(np.float64))[:, None] - centroids[:6]) ** 2).sum(2)
    table[class_of != y[:, None]] = np.inf
    np.testing.assert_array_equal(targets, table.argmin(1))
    np.testing.assert_allclose(distances, table.min(1), atol=1e-6)


def test_the_scores_of_the_seeds_equal_those_counted_by_a_loop() -> None:
    random = np.random.default_rng(8)
    found = given(random.normal(size=(4, 5)), [0, 0, 1, 2])
    clusters = random.integers(0, 7, 200).astype(np.int32)
    classes = random.integers(0, 4, 200).astype(np.int32)  # 3 has no seeds
    facts = score_seeds(found, NAMES, np.bincount(clusters, minlength=7), clusters, classes)
    owner = [0, 0, 1, 2, 3, 3, 3]
    for j, cluster in enumerate(facts["clusters"]):
        inside = clusters == j
        own = inside & (classes == owner[j])
        assert cluster["size"] == inside.sum()
        assert cluster["share"] == pytest.approx(inside.mean())
        assert cluster["purity"] == pytest.approx(own.sum() / inside.sum())
        assert cluster["recall"] == pytest.approx(own.sum() / (classes == owner[j]).sum())
    confusion = np.zeros((4, 4), int)
    for cluster, true in zip(clusters, classes, strict=True):
        confusion[true, owner[cluster]] += 1
    assert facts["confusion"] == confusion.tolist()
    right = confusion.trace() - confusion[3, 3]
    assert facts["purity"] == pytest.approx(right / confusion[:, :3].sum())
    assert facts["recall"] == pytest.approx(right / confusion[:3].sum())


def test_without_held_out_samples_purity_and_recall_are_none() -> None:
    none = np.zeros(0, np.int32)
    facts = score_seeds(given(np.eye(3)), NAMES, np.array([2, 0, 1, 5]), none, none)
    assert facts["purity"] is None
    assert facts["recall"] is None
    assert facts["share"] == 3 / 8
    assert torch.tensor(facts["confusion"]).sum() == 0


def test_prototypes_of_rows_that_are_not_whitened_stay_in_their_space() -> None:
    rows = np.eye(3, 5, dtype=np.float32)
    np.testing.assert_array_equal(carry_over(rows, None, None), rows)
    np.testing.assert_array_equal(carry_over(rows, None, whitening()), rows)
