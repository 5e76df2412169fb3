"""The probe by SGD: its gradient, its agreement with scikit-learn, and what is degenerate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.errors import DataError
from deepclust.evaluate import sgd
from deepclust.evaluate.frozen import freeze
from deepclust.evaluate.linear import linear
from deepclust.evaluate.sgd import fit, gradient, linear_sgd, right
from tests.evaluate.blobs import splits


def test_gradients_of_every_rate_are_those_of_autograd() -> None:
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    weights = torch.randn(4, 6, 3, requires_grad=True)
    for one in weights:
        torch.nn.functional.cross_entropy(x @ one[:-1] + one[-1], y).backward(retain_graph=True)
    assert weights.grad is not None
    torch.testing.assert_close(gradient(weights.detach(), x, y), weights.grad)


def test_it_agrees_with_scikit_learn_and_twice_with_itself() -> None:
    train, test = splits(3000, noise=2.0)
    frozen = freeze(train, test)
    ours = dict(linear_sgd(frozen))
    assert ours["top1"] == pytest.approx(dict(linear(frozen))["top1"], abs=0.01)  # of 1,500 rows
    assert ours["lr"] in sgd.RATES
    assert dict(linear_sgd(frozen)) == ours


def test_rates_that_are_trained_together_end_as_each_alone() -> None:
    x, y, kept = torch.randn(300, 4), torch.arange(300) % 3, np.arange(300)
    together = fit(x, y, kept, (0.01, 0.1), 3, 0)
    for one, rate in zip(together, (0.01, 0.1), strict=True):
        torch.testing.assert_close(one, fit(x, y, kept, (rate,), 3, 0)[0], rtol=1e-4, atol=1e-5)


def test_tiles_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x, y = torch.randn(2, 5, 3), torch.randn(50, 4), torch.arange(50) % 3
    whole = right(weights, x, y)
    monkeypatch.setattr(sgd, "LOGITS", 6 * 7)
    assert torch.equal(right(weights, x, y), whole)


def test_one_row_a_class_is_too_few_and_an_unknown_class_is_wrong() -> None:
    (x, y), (tx, ty) = splits(300)
    with pytest.raises(DataError, match="two of each class"):
        dict(linear_sgd(freeze((x[:20], np.arange(20)), (tx, ty))))
    assert dict(linear_sgd(freeze((x, y), (tx, np.full_like(ty, 9)))))["top1"] == 0.0
