"""Evaluators on arrays: which ones run, and which labels and rows are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from deepclust.errors import DataError, DeepclustError, RecipeError
from deepclust.evaluate import EVALUATORS, evaluate, evaluate_features, find_evaluator
from deepclust.evaluate.frozen import freeze
from tests.evaluate.blobs import splits


def test_every_evaluator_answers_under_its_name_but_two_need_more_than_features() -> None:
    reasons: list[str] = []
    scores = evaluate(freeze(*splits(200)), emit=reasons.append)
    assert list(EVALUATORS) == [*scores, "prototypes", "classifier"]
    assert list(scores) == ["knn", "linear", "clusters", "spherical_clusters"]
    assert reasons == [
        "prototypes is not evaluated: no labelled seeds were given",
        "classifier is not evaluated: no classifier was given",
    ]
    assert {"top1"} <= set(scores["knn"]) & set(scores["linear"])
    assert {"nmi", "ari", "accuracy"} <= set(scores["clusters"])
    assert all(
        isinstance(value, list if name == "interval" else float)
        for numbers in scores.values()
        for name, value in numbers.items()
    )


def test_only_what_is_asked_for_runs() -> None:
    assert set(evaluate_features(*splits(100), names=["knn"])) == {"knn"}


def test_an_evaluator_that_is_requested_and_cannot_run_is_an_error() -> None:
    with pytest.raises(DataError, match="prototypes cannot be evaluated: no labelled seeds"):
        evaluate_features(*splits(100), names=["prototypes"])


def test_an_unknown_evaluator_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match="'svm'; choose from knn, linear, clusters, spherical_clusters"
    ):
        evaluate_features(*splits(100), names=["svm"])


def test_a_module_is_an_evaluator_without_an_edit_of_the_package() -> None:
    (x, y), (test_x, test_y) = splits(200)
    scores = evaluate_features((x, y), (test_x, test_y), names=["tests.toys.evaluator", "knn"])
    means = np.stack([x[y == c].mean(0) for c in range(4)])
    nearest = ((test_x[:, None] - means) ** 2).sum(2).argmin(1)
    assert scores["tests.toys.evaluator"]["top1"] == pytest.approx((nearest == test_y).mean())
    assert list(scores) == ["tests.toys.evaluator", "knn"]


def test_a_module_that_is_not_an_evaluator_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no.such' cannot be imported.*PYTHONPATH"):
        find_evaluator("no.such")
    with pytest.raises(RecipeError, match=r"tests.evaluate.blobs has no function evaluate"):
        find_evaluator("tests.evaluate.blobs")


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


def test_an_evaluator_fails_alone_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(frozen: object) -> Iterator[tuple[str, float]]:
        raise KeyError("no such column")
        yield "top1", 0.0

    monkeypatch.setitem(EVALUATORS, "breaks", breaks)
    reasons: list[str] = []
    (train, labels), test = splits(200)
    one_each = np.unique(labels, return_index=True)[1]  # too few for `linear`
    frozen = freeze((train[one_each], labels[one_each]), test)
    scores = evaluate(frozen, ["breaks", "linear", "knn"], reasons.append)
    assert list(scores) == ["knn"]
    assert [reason.split(":")[0] for reason in reasons] == [
        "breaks is not evaluated",
        "linear is not evaluated",
    ]
    with pytest.raises(DeepclustError, match=r"breaks cannot be evaluated: KeyError: .*column"):
        evaluate(frozen, ["breaks"])
    with pytest.raises(DataError, match="linear cannot be evaluated"):
        evaluate(frozen, ["linear", "breaks"])


@pytest.mark.parametrize("change", [lambda x: x * 1e-30, lambda x: x * 1e30])
def test_the_scale_of_features_changes_no_score(change: Callable[[np.ndarray], np.ndarray]) -> None:
    (x, y), (test_x, test_y) = splits(200)
    plain = evaluate_features((x, y), (test_x, test_y))
    scaled = evaluate_features((change(x), y), (change(test_x), test_y), ["knn", "clusters"])
    assert scaled["knn"]["top1"] == pytest.approx(plain["knn"]["top1"], abs=0.02)
    assert scaled["clusters"]["nmi"] == pytest.approx(plain["clusters"]["nmi"], abs=0.05)


def test_float64_features_far_from_the_origin_are_as_good_as_others() -> None:
    (x, y), (test_x, test_y) = splits(200)
    near = evaluate_features((x, y), (test_x, test_y), ["linear", "clusters"])
    wide = x.astype(np.float64) + 1e8, test_x.astype(np.float64) + 1e8
    far = evaluate_features((wide[0], y), (wide[1], test_y), ["linear", "clusters"])
    assert far["linear"]["top1"] == pytest.approx(near["linear"]["top1"], abs=0.02)
    assert far["clusters"]["nmi"] == pytest.approx(near["clusters"]["nmi"], abs=0.05)
