"""The border of the room: which labels and rows are refused, and what the message tells."""

from __future__ import annotations

import numpy as np
import pytest

from deepclust.errors import DataError, RecipeError
from deepclust.evaluate import EVALUATORS, evaluate_features
from tests.evaluate.blobs import splits


def test_every_evaluator_answers_under_its_name() -> None:
    found = evaluate_features(*splits(200))
    assert list(found) == list(EVALUATORS) == ["knn", "linear", "clusters"]
    assert {"top1"} <= set(found["knn"]) & set(found["linear"])
    assert {"nmi", "ari", "accuracy"} <= set(found["clusters"])
    assert all(isinstance(value, float) for numbers in found.values() for value in numbers.values())


def test_only_what_is_asked_for_runs() -> None:
    assert set(evaluate_features(*splits(100), names=["knn"])) == {"knn"}


def test_an_unknown_evaluator_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="'svm'; choose from knn, linear, clusters"):
        evaluate_features(*splits(100), names=["svm"])


def test_shards_without_labels_are_refused_with_the_fix() -> None:
    (x, _), test = splits(100)
    with pytest.raises(DataError, match=r"train shards have no labels.*KEY.cls"):
        evaluate_features((x, None), test)


def test_a_sample_without_label_is_refused_and_named() -> None:
    train, (x, y) = splits(100)
    y[[7, 9]] = -1
    with pytest.raises(DataError, match=r"2 of the 50 test samples have no label.*row 7.*KEY.cls"):
        evaluate_features(train, (x, y))


def test_a_row_that_is_not_finite_is_refused_and_named() -> None:
    (x, y), test = splits(100)
    x[3, 5] = np.nan
    with pytest.raises(DataError, match=r"1 train rows are not finite.*row 3"):
        evaluate_features((x, y), test)


def test_one_class_is_refused() -> None:
    (x, y), test = splits(100)
    with pytest.raises(DataError, match="all 100 training rows have label 0"):
        evaluate_features((x, np.zeros_like(y)), test)


def test_other_widths_and_counts_are_refused() -> None:
    (x, y), (tx, ty) = splits(100)
    with pytest.raises(DataError, match="16 columns and test features 8"):
        evaluate_features((x, y), (tx[:, :8], ty))
    with pytest.raises(DataError, match="99 rows of features and 100 labels"):
        evaluate_features((x[:99], y), (tx, ty))
