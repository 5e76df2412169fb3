"""Clusters against classes: scikit-learn's scores, the class count alone from training labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
)

from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.statistics import accuracy
from deepclust.clustering.whiten import Whitening
from deepclust.errors import DataError
from deepclust.evaluate.clusters import clusters, spherical_clusters
from deepclust.evaluate.frozen import Labelled, freeze
from deepclust.world import derive
from tests.evaluate.blobs import splits


def scores(train: Labelled, test: Labelled, dim: int = 64, **options: int) -> dict[str, float]:
    return dict(clusters(freeze(train, test, dim=dim), **options))


def test_scores_are_those_of_scikit_learn_for_the_nearest_centroids() -> None:
    train, (x, y) = splits(400, noise=0.8)
    whiten = Whitening.fit(train[0], 4)
    fitted = kmeans(
        whiten(train[0]), 4, seed=derive(0, "evaluate", "clusters", 0), init="k-means++"
    )
    centroids = np.asarray(fitted.centroids)
    labels = ((whiten(x)[:, None] - centroids) ** 2).sum(2).argmin(1)
    values = scores(train, (x, y), dim=4, restarts=1)
    assert 0.1 < values["nmi"] < 0.99
    expected = normalized_mutual_info_score(y, labels, average_method="geometric")
    assert values["nmi"] == pytest.approx(expected, abs=1e-6)
    assert values["ari"] == pytest.approx(adjusted_rand_score(y, labels), abs=1e-6)
    assert values["ami"] == pytest.approx(adjusted_mutual_info_score(y, labels), abs=1e-6)
    arithmetic = normalized_mutual_info_score(y, labels)
    assert values["nmi_arithmetic"] == pytest.approx(arithmetic, abs=1e-6)
    low, high = values["interval"]
    assert low < values["accuracy"] < high
    assert values["accuracy"] == pytest.approx(accuracy(labels, y))


def test_spherical_scores_are_those_of_the_centroid_of_the_largest_cosine() -> None:
    train, (x, y) = splits(400, noise=0.8)
    rows = train[0] / np.linalg.norm(train[0], axis=1, keepdims=True)
    start = derive(0, "evaluate", "clusters", 0)
    fitted = kmeans(rows, 4, seed=start, init="k-means++", spherical=True)
    labels = (x @ np.asarray(fitted.centroids).T).argmax(1)
    values = dict(spherical_clusters(freeze(train, (x, y)), restarts=1))
    expected = normalized_mutual_info_score(y, labels, average_method="geometric")
    assert values["nmi"] == pytest.approx(expected, abs=1e-6)


def test_spherical_scores_do_not_depend_on_the_length_of_a_row() -> None:
    train, (x, y) = splits(400, noise=0.8)
    longer = x * np.random.default_rng(0).uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    a, b = (dict(spherical_clusters(freeze(train, test))) for test in ((x, y), (longer, y)))
    assert a.pop("interval") == pytest.approx(b.pop("interval"), abs=1e-9)
    assert a == pytest.approx(b, abs=1e-9)


def test_blobs_far_apart_are_recovered_exactly() -> None:
    frozen = freeze(*splits(400, noise=0.05))
    for protocol in (clusters, spherical_clusters):
        values = dict(protocol(frozen, restarts=1))
        assert values.pop("interval") == [1.0, 1.0]
        assert values == pytest.approx(dict.fromkeys(values, 1.0), abs=1e-9)


def test_the_whitening_keeps_dim_directions_or_all_of_fewer() -> None:
    train, test = splits(400, noise=1.2)
    assert scores(*splits(400, noise=1.2)) == scores(train, test, dim=64)
    assert scores(train, test, dim=4)["nmi"] > scores(train, test, dim=16)["nmi"]  # only noise
    (x, y), (test_x, test_y) = splits(300, noise=0.3, classes=12)
    narrow = (x[:, :5], y), (test_x[:, :5], test_y)
    assert scores(*narrow) == scores(*narrow, dim=5)


def test_training_labels_give_nothing_but_their_number() -> None:
    (x, y), test = splits(400, noise=0.8)
    shuffled = np.random.default_rng(0).permutation(y)
    assert scores((x, shuffled), test) == scores((x, y), test)


def test_scores_are_means_over_the_restarts() -> None:
    train, (x, y) = splits(300, noise=0.3, classes=12)
    whiten = Whitening.fit(train[0], 12)
    singles = []
    for restart in range(3):
        start = derive(0, "evaluate", "clusters", restart)
        fitted = kmeans(whiten(train[0]), 12, seed=start, init="k-means++")
        labels = ((whiten(x)[:, None] - fitted.centroids) ** 2).sum(2).argmin(1)
        singles.append(normalized_mutual_info_score(y, labels, average_method="geometric"))
    mean = scores(train, (x, y), dim=12, restarts=3)["nmi"]
    assert min(singles) < max(singles)
    assert mean == pytest.approx(np.mean(singles), abs=1e-6)


def test_features_without_structure_score_about_nothing() -> None:
    train, test = splits(600, noise=1e4)
    values = scores(train, test)
    assert values["nmi"] < 0.05
    assert abs(values["ari"]) < 0.05


def test_computing_twice_gives_the_same_numbers() -> None:
    train, test = splits(300, noise=0.8)
    assert scores(train, test) == scores(train, test)


def test_fewer_different_rows_than_classes_is_a_clear_error() -> None:
    (x, y), test = splits(100)
    x[:] = x[[0, 1]].repeat(50, axis=0)
    with pytest.raises(DataError, match="distinct"):
        scores((x, y), test)
