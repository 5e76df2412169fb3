"""Low-shot probes: balanced subsets by the seed, and the linear probe on them."""

from __future__ import annotations

import numpy as np
import pytest

from deepclust.evaluate import evaluate_features
from deepclust.evaluate.frozen import Skipped, freeze
from deepclust.evaluate.low_shot import balanced_rows, low_shot_1, low_shot_10
from tests.evaluate.blobs import splits


def test_a_subset_has_as_many_rows_of_each_class_or_all_of_a_small_one() -> None:
    labels = np.repeat([0, 1, 5], [90, 7, 60])
    rows = balanced_rows(labels, 10, 0)
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [10, 7, 10]
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() == balanced_rows(labels, 10, 0).tolist()
    assert rows.tolist() != balanced_rows(labels, 10, 1).tolist()


def test_the_probe_of_a_tenth_is_the_linear_probe_of_these_rows() -> None:
    (x, y), test = splits(1000, noise=1.5)
    values = dict(low_shot_10(freeze((x, y), test)))
    rows = balanced_rows(y, 25, 0)
    expected = evaluate_features((x[rows], y[rows]), test, ["linear"])["linear"]
    assert values == {**expected, "labels": 100.0}
    fewer = dict(low_shot_1(freeze((x, y), test)))
    assert fewer["labels"] == 8
    assert fewer["top1"] < values["top1"]


def test_too_few_rows_of_a_class_are_skipped_with_a_reason() -> None:
    with pytest.raises(Skipped, match=r"1% of 400 training rows are 1 of each of 4 classes"):
        dict(low_shot_1(freeze(*splits(400))))
