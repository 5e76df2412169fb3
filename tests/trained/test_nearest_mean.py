"""The nearest class mean: a slow reference, what it does not depend on, and degenerate labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.errors import DataError, NumericalError
from deepclust.trained.nearest_mean import (
    TEMPERATURE,
    TEMPERATURES,
    ClassMeans,
    class_means,
    fitted_temperature,
)
from tests.evaluate.blobs import blobs

NAMES = ["ant", "bee", "cat", "dog"]


def means_of(rows: np.ndarray, classes: np.ndarray, names: list[str] = NAMES) -> ClassMeans:
    return class_means(rows.astype(np.float32), classes.astype(np.int32), names)


def logits(means: ClassMeans, rows: np.ndarray) -> np.ndarray:
    answers: np.ndarray = means(torch.from_numpy(rows.astype(np.float32))).numpy()
    return answers


def cosines(means: ClassMeans, rows: np.ndarray) -> np.ndarray:
    return logits(means, rows) / means.means.norm(dim=1).numpy()


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


def slow(rows: np.ndarray, classes: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """The logits in float64, row by row."""
    units = [unit(row) for row in rows.astype(float)]

    def mean_of(number: int, without: int = -1) -> np.ndarray:
        own = [u for i, u in enumerate(units) if classes[i] == number and i != without]
        return unit(np.sum(own, axis=0))

    means = [mean_of(number) for number in range(len(NAMES))]
    centre = sum(means) / len(means)

    def cosine(row: np.ndarray, mean: np.ndarray) -> float:
        return float(unit(row - centre) @ unit(mean - centre))

    def loss(temperature: float) -> float:
        total = 0.0
        for i, row in enumerate(units):
            given = [mean_of(n, i) if n == classes[i] else means[n] for n in range(len(NAMES))]
            odds = np.exp([cosine(row, mean) / temperature for mean in given])
            total -= np.log(odds[classes[i]] / odds.sum())
        return total

    best = min(TEMPERATURES, key=loss)
    return np.array(
        [[cosine(unit(probe), mean) / best for mean in means] for probe in probes.astype(float)]
    )


def test_logits_are_those_of_a_slow_reference() -> None:
    (rows, classes), (probes, truth) = blobs(60), blobs(40, seed=1)
    answers = logits(means_of(rows + 5, classes), probes + 5)
    np.testing.assert_allclose(answers, slow(rows + 5, classes, probes + 5), atol=1e-3)
    assert (answers.argmax(1) == truth).mean() > 0.9


@given(st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_only_the_directions_of_the_rows_and_their_share_in_a_class_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    (rows, classes), probes = blobs(50, noise=2.0), blobs(20, noise=2.0, seed=1)[0]
    before = cosines(means_of(rows, classes), probes)
    lengths, order = random.uniform(0.1, 9, (50, 1)), random.permutation(50)
    again = np.concatenate([order, order[classes[order] == 2]])  # class 2 twice
    after = cosines(means_of((lengths * rows)[again], classes[again]), 3 * probes)
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_the_order_of_the_rows_changes_no_bit() -> None:
    rows, classes = blobs(50, noise=2.0)
    order = np.random.default_rng(0).permutation(50)
    one, other = means_of(rows, classes), means_of(rows[order], classes[order])
    assert torch.equal(one.means, other.means)
    assert torch.equal(one.centre, other.centre)


def test_one_class_is_every_answer() -> None:
    rows, _ = blobs(9)
    answers = logits(means_of(rows, np.zeros(9), ["ant"]), -rows)
    assert (torch.from_numpy(answers).softmax(1) == 1).all()


def test_one_row_of_each_class_is_its_mean_at_a_known_temperature() -> None:
    rows = np.eye(4, 6)
    means = means_of(rows, np.arange(4))
    assert logits(means, 7 * rows).argmax(1).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(means.means.norm(dim=1), 1 / TEMPERATURE, rtol=1e-6)


@pytest.mark.parametrize("noise", [1.0, 3.0, 9.0])
def test_probabilities_are_as_sure_as_they_are_right(noise: float) -> None:
    (rows, classes), (probes, truth) = blobs(400, noise=noise), blobs(2000, noise=noise, seed=1)
    odds = torch.from_numpy(logits(means_of(rows, classes), probes)).softmax(1)
    sure, answers = odds.max(1)
    right = (answers.numpy() == truth).mean()
    assert abs(float(sure.mean()) - right) < 0.06


def test_noisier_rows_have_a_higher_temperature() -> None:
    def fitted(noise: float) -> float:
        rows, classes = blobs(200, noise=noise)
        return 1 / float(means_of(rows, classes).means.norm(dim=1)[0])

    assert fitted(0.3) < fitted(3.0) < fitted(30.0)


def test_a_class_of_one_row_does_not_fit_the_temperature() -> None:
    rows = blobs(40)[0]
    centre, means = np.zeros(rows.shape[1]), np.eye(4, rows.shape[1])
    assert fitted_temperature(rows[:4], np.arange(4, dtype=np.int32), centre, means) == TEMPERATURE


def test_a_network_that_has_collapsed_gives_all_classes_the_same_probability() -> None:
    rows = np.tile(blobs(1)[0], (8, 1))
    answers = logits(means_of(rows, np.arange(8) % 4), rows)
    np.testing.assert_array_equal(answers, np.zeros((8, 4)))


def test_a_class_without_a_row_or_without_a_direction_is_named() -> None:
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(DataError, match=r"1 classes have no labelled row.*'cat'"):
        means_of(rows, np.array([0, 1, 1]), ["ant", "bee", "cat"])
    with pytest.raises(NumericalError, match="class 'ant' cancel"):
        means_of(rows, np.array([0, 0, 1]), ["ant", "bee"])
    with pytest.raises(NumericalError, match="row"):
        means_of(rows * np.nan, np.array([0, 0, 1]), ["ant", "bee"])
