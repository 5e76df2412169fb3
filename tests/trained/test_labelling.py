"""Labels of rows: the nearest and the second centroid, tile by tile, in memory that stays."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from deepclust.trained import labelling
from deepclust.trained.labelling import Answers, Balanced, Distances, Labels, Nearest, label
from tests.forks import in_fork

NAMES = ("clusters", "distances", "seconds", "margins")


def drawn(n: int, k: int, d: int = 16) -> tuple[np.ndarray, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=draw).half().numpy()
    return rows, torch.randn(1, k, d, generator=draw)


def assert_same(one: Labels, other: Labels) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_labels_are_those_of_all_distances() -> None:
    rows, centroids = drawn(300, 40)
    squares = torch.cdist(torch.from_numpy(rows).double(), centroids[0].double()).square().numpy()
    found = label(Nearest(centroids), rows)
    order = np.argsort(squares, 1)
    np.testing.assert_array_equal(found.clusters, order[:, 0])
    np.testing.assert_array_equal(found.seconds, order[:, 1])
    least = np.sort(squares, 1)
    np.testing.assert_allclose(found.distances, least[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.margins, least[:, 1] - least[:, 0], rtol=1e-3, atol=1e-4)


def balanced(k: int, sharpness: float = 25.0) -> Balanced:
    draw = torch.Generator().manual_seed(1)
    scalings = torch.randn(1, k, generator=draw).double()
    return Balanced(drawn(1, k)[1], torch.randn(1, k, generator=draw), scalings, sharpness)


def test_balanced_labels_are_the_largest_of_p_times_the_scalings() -> None:
    rows, rule = torch.from_numpy(drawn(300, 40)[0]).float(), balanced(40)
    found = label(rule, rows)
    log_p = torch.log_softmax(rows.double() @ rule.weight[0].double().T + rule.bias[0], 1)
    wanted = 25 * log_p + rule.scalings[0]
    best = wanted.topk(2, 1)
    np.testing.assert_array_equal(found.clusters, best.indices[:, 0])
    np.testing.assert_array_equal(found.seconds, best.indices[:, 1])
    own = log_p.gather(1, best.indices[:, :1])[:, 0]
    np.testing.assert_allclose(found.distances, -own, atol=1e-4)
    margins = (best.values[:, 0] - best.values[:, 1]) / 25
    np.testing.assert_allclose(found.margins, margins, atol=1e-4)


def test_answers_are_the_largest_logits() -> None:
    logits = torch.from_numpy(drawn(300, 1, 9)[0]).float()
    kept = logits.clone()
    found = label(Answers(9), logits)
    best = logits.topk(2, 1)
    np.testing.assert_array_equal(found.clusters, best.indices[:, 0])
    np.testing.assert_array_equal(found.seconds, best.indices[:, 1])
    np.testing.assert_allclose(found.margins, best.values[:, 0] - best.values[:, 1], atol=1e-5)
    own = -logits.log_softmax(1).gather(1, best.indices[:, :1])[:, 0]
    np.testing.assert_array_equal(found.distances, own)
    assert torch.equal(logits, kept)


RULES = {
    "nearest": Nearest(drawn(1, 40)[1], spherical=True), "balanced": balanced(40),
    "answers": Answers(16),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_labels_do_not_depend_on_the_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rule = drawn(300, 40)[0], RULES[name]
    whole = label(rule, rows)
    monkeypatch.setattr(labelling, "CELLS", 7 * rule.k)
    found = label(rule, rows)
    if name != "balanced":
        assert_same(whole, found)
    np.testing.assert_array_equal(found.clusters, whole.clusters)
    np.testing.assert_allclose(found.margins, whole.margins, atol=1e-5)  # of another product


def grown(n: int, k: int) -> float:
    """How many bytes the labels of n rows take at most, in a process that has made some."""
    rows, rule = torch.from_numpy(drawn(n, 1)[0]), balanced(k)
    label(rule, rows[:3000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    label(rule, rows)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_memory_does_not_grow_with_the_tiles() -> None:
    assert in_fork(grown, 40_000, 3000) < 40_000 * 3000  # scores in float64 are eight times that


def test_one_cluster_has_no_second() -> None:
    found = label(Nearest(drawn(5, 1)[1]), drawn(5, 1)[0])
    assert found.seconds.tolist() == [-1] * 5
    assert np.isnan(found.margins).all()
    assert len(label(Nearest(drawn(5, 3)[1]), drawn(0, 3)[0]).clusters) == 0


def test_the_scores_of_every_tile_are_in_the_same_memory() -> None:
    rows, centroids = drawn(50, 30)
    distances, tile = Distances(centroids[0]), torch.from_numpy(rows).float()
    first = distances(tile)
    wanted = centroids[0].square().sum(1) - 2 * (tile @ centroids[0].T)
    torch.testing.assert_close(first, wanted, rtol=0, atol=0)
    assert distances(tile[:20]).data_ptr() == first.data_ptr()
