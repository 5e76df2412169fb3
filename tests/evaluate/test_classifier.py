"""The run's own answers: against a slow reference, with free columns, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust.errors import DataError
from deepclust.evaluate import evaluate
from deepclust.evaluate.classifier import FREE, classifier
from deepclust.evaluate.frozen import Answers, Frozen, Skipped, freeze
from tests.evaluate.blobs import splits

RANDOM = np.random.default_rng(1).normal(size=(4, 16))  # the centres of the blobs


def frozen(classes: int, columns: int, noise: float = 2.0, sharpness: float = 1.0) -> Frozen:
    """Four blobs, of which the first have a column each, and the next columns are free."""
    weight = torch.from_numpy(np.concatenate([RANDOM, RANDOM])[:columns]).float()

    def classify(features: np.ndarray) -> Tensor:
        return sharpness * torch.from_numpy(features) @ weight.T

    class_of = np.where(np.arange(columns) < classes, np.arange(columns), -1)
    names = tuple(str(i) for i in range(classes))
    answers = Answers(classify, names, class_of, (3,) * classes)
    return replace(freeze(*splits(400, noise=noise)), answers=answers)


def scores(*case: Any, **options: Any) -> dict[str, Any]:
    return dict(classifier(frozen(*case, **options)))


def test_scores_are_those_of_a_slow_reference() -> None:
    x, y = splits(400, noise=2.0)[1]
    p = torch.from_numpy(x @ RANDOM.T.astype(np.float32)).double().softmax(1).numpy()
    right, sure = p.argmax(1) == y, p.max(1)
    values = scores(4, 4)
    assert values["top1"] == pytest.approx(right.mean())
    assert values["recall"] == pytest.approx(np.mean([right[y == c].mean() for c in range(4)]))
    assert values["nll"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-5)
    ece = 0.0
    for b in range(15):
        own = (sure > b / 15) & (sure <= (b + 1) / 15)
        ece += own.mean() * abs(right[own].mean() - sure[own].mean()) if own.any() else 0
    assert values["ece"] == pytest.approx(ece, rel=1e-5)
    assert "top1_open" not in values
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (y, p.argmax(1)), 1)
    assert values["confusion"]["values"] == confusion.tolist()
    assert sum(row[0] for row in values["calibration"]["values"]) == len(y)


def test_a_class_without_a_label_is_answered_by_the_free_column_that_matches_it() -> None:
    values = scores(3, 4, noise=0.05)
    share = (splits(400)[1][1] == 3).mean()
    assert values["recall_unlabelled"] == values["top1_open"] == 1
    assert values["free"] == pytest.approx(share)
    assert values["top1"] == pytest.approx(1 - share)
    assert values["confusion"]["columns"] == ["0", "1", "2", FREE]
    assert values["classes"]["values"][3][::2] == [0, 1.0]


def test_a_class_without_a_label_and_without_a_free_column_is_never_recalled() -> None:
    values = scores(3, 3, noise=0.05)
    assert values["recall_unlabelled"] == values["free"] == 0
    assert values["recall"] == pytest.approx(0.75)


def test_several_columns_of_a_class_are_added_up() -> None:
    one, two = frozen(4, 4), frozen(4, 8)
    assert two.answers is not None
    doubled = replace(two, answers=replace(two.answers, class_of=np.arange(8) % 4))
    assert dict(classifier(doubled))["nll"] == pytest.approx(dict(classifier(one))["nll"])


def test_the_most_confident_answers_and_the_most_wrong_stay_finite() -> None:
    values = scores(4, 4, sharpness=1e4)
    assert np.isfinite(values["nll"])
    assert values["calibration"]["rows"] == ["0.93 to 1.00"]


def test_two_classes_without_a_label_do_not_share_a_free_column() -> None:
    values = scores(2, 3, noise=0.05)
    assert values["recall_unlabelled"] == pytest.approx(0.5)


def test_without_a_classifier_it_is_skipped_with_the_reason_and_other_classes_are_refused() -> None:
    bare = replace(frozen(4, 4), answers=None, answers_missing="nothing is answered")
    with pytest.raises(Skipped, match="nothing is answered"):
        dict(classifier(bare))
    given = frozen(4, 4)
    assert given.answers is not None
    strange = replace(given, answers=replace(given.answers, classes=("a", "b", "c", "d")))
    with pytest.raises(DataError, match=r"class of the seeds \(a, b, c, d\)"):
        evaluate(strange, ["classifier"])
