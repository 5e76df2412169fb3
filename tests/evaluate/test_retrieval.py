"""Retrieval: scikit-learn's average precision, whatever the tiles and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from deepclust.evaluate.frozen import freeze
from deepclust.evaluate.retrieval import average_precision, retrieval
from tests.evaluate.blobs import splits


def test_map_is_that_of_scikit_learn() -> None:
    (x, y), (test_x, test_y) = splits(300, noise=1.5)
    cosine = test_x / np.linalg.norm(test_x, axis=1)[:, None]
    cosine = cosine @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    pairs = zip(cosine, test_y, strict=True)
    expected = [average_precision_score(y == one, row) for row, one in pairs]
    values = dict(retrieval(freeze((x, y), (test_x, test_y))))
    assert values["map"] == pytest.approx(np.mean(expected), abs=1e-6)
    low, high = values["interval"]
    assert low < values["map"] < high
    assert values["queries"] == 150


def test_rows_of_equal_similarity_come_in_together_as_in_scikit_learn() -> None:
    random = np.random.default_rng(0)
    scores, right = (
        random.integers(0, 4, (20, 30)).astype(np.float32),
        random.random((20, 30)) < 0.3,
    )
    ours = average_precision(torch.from_numpy(scores), torch.from_numpy(right))
    pairs = zip(right, scores, strict=True)
    expected = [average_precision_score(truth, row) for truth, row in pairs]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)
    nothing = average_precision(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert nothing.tolist() == [0.0]


def test_tiles_change_nothing_and_many_queries_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze(*splits(300, noise=1.5))
    whole = dict(retrieval(frozen))["map"]
    monkeypatch.setitem(retrieval.__globals__, "TILE", 1000)
    assert dict(retrieval(frozen))["map"] == pytest.approx(whole, abs=1e-7)
    monkeypatch.setitem(retrieval.__globals__, "MOST_QUERIES", 60)
    some = dict(retrieval(frozen))
    assert some["queries"] == 60
    assert some == dict(retrieval(frozen))
    assert some["map"] == pytest.approx(whole, abs=0.1)
