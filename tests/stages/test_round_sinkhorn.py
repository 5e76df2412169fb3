"""Labels of a whole set from the answers of heads: balanced, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from deepclust.recipe.declare import Refresh
from deepclust.recipe.sections import ClusterSection
from deepclust.stages import round_sinkhorn
from deepclust.stages.cluster import head_seeds
from deepclust.stages.round_kmeans import RoundClusters, RoundTask
from deepclust.world import World
from tests.ranks import on_ranks
from tests.stages.test_round_kmeans import Silent, solve

N, D, K, HEADS = 300, 8, 6, 2


def scorer() -> dict[str, torch.Tensor]:
    """Heads that answer with some certainty, and prefer some clusters."""
    random = torch.Generator().manual_seed(1)
    weight = 0.7 * torch.randn(HEADS, K, D, generator=random)
    return {"weight": weight, "bias": torch.randn(HEADS, K, generator=random)}


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float16)


def label(world: World, scores: bool = True, cells: int = 40 * K, kept: int = 0) -> Any:
    """Label the rows, every tenth of which is excluded, in tiles of 40."""
    round_sinkhorn.CELLS, round_sinkhorn.KEPT = cells, kept
    refresh = Refresh(heads=HEADS, kind="sinkhorn", whiten=False, sharpness=10)
    task = RoundTask(
        rows(), np.flatnonzero(np.arange(N) % 10), ClusterSection(k=K), refresh, None,
        head_seeds(7, 2, HEADS), torch.device("cpu"), world, Silent(), lambda head, one: None,
        scorer=scorer() if scores else None,
    )  # fmt: skip
    return round_sinkhorn.label_round(task)[0]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_sinkhorn, "CELLS", round_sinkhorn.CELLS)
    monkeypatch.setattr(round_sinkhorn, "KEPT", round_sinkhorn.KEPT)


def dense(head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The plan of the whole set in float64, its labels, and -log p of them."""
    valid = np.flatnonzero(np.arange(N) % 10)
    weight, bias = (scorer()[name][head].double().numpy() for name in ("weight", "bias"))
    log_p = log_softmax(rows()[valid].astype(np.float64) @ weight.T + bias, axis=1)
    scores, v = 10 * log_p, np.zeros(K)
    for _ in range(5000):
        u = -logsumexp(scores + v, axis=1, keepdims=True)
        v = -np.log(K) + np.log(len(valid)) - logsumexp(scores + u, axis=0)
    labels = (scores + v).argmax(1)
    return np.exp(scores + u + v), labels, -log_p[np.arange(len(valid)), labels]


def test_labels_are_those_of_the_balanced_plan(restored: None) -> None:
    heads: list[RoundClusters] = label(World())
    for head, clusters in enumerate(heads):
        plan, labels, costs = dense(head)
        np.testing.assert_allclose(plan.sum(0), len(plan) / K, rtol=1e-6)
        valid = clusters.assignments >= 0
        assert (np.flatnonzero(~valid) % 10 == 0).all()
        assert np.isnan(clusters.distances[~valid]).all()
        agree = clusters.assignments[valid] == labels
        assert agree.mean() > 0.98  # our masses are within 1 %
        np.testing.assert_allclose(clusters.distances[valid][agree], costs[agree], atol=1e-3)
        assert clusters.facts["imbalance"] <= round_sinkhorn.TOLERANCE
        assert clusters.inertia == pytest.approx(np.nansum(clusters.distances), rel=1e-6)
    assert not np.array_equal(heads[0].assignments, heads[1].assignments)


def test_any_number_of_ranks_and_kept_scores_give_the_same_bits(restored: None) -> None:
    alone, kept = label(World()), label(World(), kept=10**9)
    for answers in ([kept], *(on_ranks(ranks, label) for ranks in (2, 3))):
        for heads in answers:
            for one, other in zip(alone, heads, strict=True):
                np.testing.assert_array_equal(one.assignments, other.assignments)
                np.testing.assert_array_equal(one.distances, other.distances)


def test_the_first_labels_are_random_and_of_equal_size(restored: None) -> None:
    heads = label(World(), scores=False)
    for clusters in heads:
        assert (clusters.assignments[::10] == -1).all()
        sizes = np.bincount(clusters.assignments[clusters.assignments >= 0], minlength=K)
        assert sizes.max() - sizes.min() <= 1
    assert not np.array_equal(heads[0].assignments, heads[1].assignments)
    again = label(World(), scores=False)
    np.testing.assert_array_equal(heads[0].assignments, again[0].assignments)


def test_statistics_have_every_key_of_a_round_of_k_means(restored: None) -> None:
    """A report reads them whatever made the round."""
    (k_means,) = solve(World(), Refresh())
    for clusters in (*label(World()), *label(World(), scores=False)):
        assert clusters.facts.keys() >= k_means.facts.keys()
