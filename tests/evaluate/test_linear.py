"""The linear probe: against scikit-learn's own search, its properties, and too few rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepclust.errors import DataError
from deepclust.evaluate import device, logistic
from deepclust.evaluate.frozen import Labelled, freeze
from deepclust.evaluate.linear import C_PATH, draw_held_out, linear, on_device
from tests.evaluate.blobs import splits


def scores(train: Labelled, test: Labelled) -> dict[str, float]:
    return dict(linear(freeze(train, test)))


def test_top1_is_that_of_a_tight_solution_at_the_same_c() -> None:
    train, test = splits(1000, noise=2.0)
    ours = scores(train, test)
    tight = make_pipeline(
        StandardScaler(), LogisticRegression(C=ours["C"], tol=1e-8, max_iter=10_000)
    ).fit(*train)
    assert 0.4 < ours["top1"] < 0.98
    assert ours["top1"] == pytest.approx(tight.score(*test), abs=0.004)
    assert ours["converged"] == 1.0


def test_noisy_labels_in_many_dimensions_call_for_a_small_c() -> None:
    (x, y), test = splits(300, noise=0.2, dim=128)
    wrong = np.random.default_rng(0).integers(0, 4, len(y))
    noisy = np.where(np.random.default_rng(1).random(len(y)) < 0.5, wrong, y)
    assert scores((x, noisy), test)["C"] == C_PATH[0]


def test_scale_and_shift_of_a_column_do_not_count() -> None:
    (x, y), (tx, ty) = splits(400, noise=2.0)
    scale, shift = np.float32(2) ** np.arange(16, dtype=np.float32), np.float32(3)
    moved = scores((x * scale + shift, y), (tx * scale + shift, ty))
    assert moved["top1"] == pytest.approx(scores((x, y), (tx, ty))["top1"], abs=0.01)


def test_computing_twice_gives_the_same_numbers() -> None:
    train, test = splits(300, noise=2.0)
    assert scores(train, test) == scores(train, test)


def test_an_unfinished_fit_is_reported_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.__globals__, "MAX_ITERATIONS", 2)
    train, test = splits(300, noise=2.0)
    assert scores(train, test)["converged"] == 0.0


def test_dead_columns_do_no_harm() -> None:
    (x, y), (tx, ty) = splits(300)
    pad = np.full((len(x), 2), 7, np.float32)
    dead = scores((np.hstack([x, pad]), y), (np.hstack([tx, pad[: len(tx)]]), ty))
    assert dead["top1"] == pytest.approx(scores((x, y), (tx, ty))["top1"], abs=0.01)


def test_the_only_row_of_a_class_is_never_held_out() -> None:
    (x, y), test = splits(300)
    y[0] = 99
    result = scores((x, y), test)
    assert result["top1"] > 0.9


def test_one_row_a_class_is_too_few() -> None:
    (x, _), test = splits(20)
    with pytest.raises(DataError, match=r"20 training rows of 20 classes.*knn"):
        scores((x, np.arange(20)), test)


def test_the_fit_on_a_device_agrees_with_scikit_learn() -> None:
    train, test = splits(1000, noise=2.0)
    frozen = freeze((train[0] + np.float64(1e6), train[1]), (test[0] + np.float64(1e6), test[1]))
    held_out = draw_held_out(frozen.train.labels, 0)
    right, strength, converged = on_device(frozen, held_out, torch.device("cpu"))
    expected = dict(linear(frozen))
    assert converged
    assert strength == expected["C"]
    assert right.mean() == pytest.approx(expected["top1"], abs=0.003)


def test_tiles_change_nothing_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), test = splits(300, noise=2.0)
    x[:, 0] = 7
    frozen = freeze((x, y), test)
    held_out = draw_held_out(y, 0)
    whole = on_device(frozen, held_out, torch.device("cpu"))
    monkeypatch.setattr(logistic, "LOGITS", 4 * 37)
    monkeypatch.setattr(device, "PIECE", 23)
    tiled = on_device(frozen, held_out, torch.device("cpu"))
    assert tiled[1:] == whole[1:]
    assert tiled[0].mean() == pytest.approx(whole[0].mean(), abs=0.005)


def test_a_class_without_a_training_row_counts_as_wrong_on_a_device() -> None:
    train, (tx, ty) = splits(300)
    frozen = freeze(train, (tx, np.full_like(ty, 9)))
    assert not on_device(frozen, draw_held_out(train[1], 0), torch.device("cpu"))[0].any()


def test_without_a_gpu_or_with_little_to_do_the_cpu_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert device.choose_device(device.WORTH).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose_device(device.WORTH).type == "cuda"
    assert device.choose_device(device.WORTH - 1).type == "cpu"
