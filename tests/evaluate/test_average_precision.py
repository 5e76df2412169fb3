"""Average precision: as scikit-learn and a slow loop have it, its properties, degenerate ranks."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from deepclust.evaluate.average_precision import Ranking, area, mean_interval, voc07


def drawn(seed: int, n: int = 60, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    scores = random.normal(size=n)
    return np.round(scores) if ties else scores, random.random(n) < 0.3


def slow_voc07(scores: np.ndarray, positive: np.ndarray) -> float:
    """The loop of the PASCAL kit: the best precision at each of eleven recalls."""
    points = []
    for least in range(11):
        best = 0.0
        for threshold in set(scores.tolist()):
            chosen = scores >= threshold
            hits = int((chosen & positive).sum())
            if 10 * hits >= least * int(positive.sum()):
                best = max(best, hits / int(chosen.sum()))
        points.append(best)
    return float(np.mean(points))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_both_are_those_of_scikit_learn_and_of_the_slow_loop(seed: int, ties: bool) -> None:
    scores, positive = drawn(seed, ties=ties)
    curve = Ranking.of(scores, positive).curve()
    assert area(*curve)[0] == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    assert voc07(*curve)[0] == pytest.approx(slow_voc07(scores, positive), abs=1e-12)


def test_weights_are_copies_of_images() -> None:
    scores, positive = drawn(0, ties=True)
    weights = np.random.default_rng(1).integers(0, 4, len(scores))
    copies = np.repeat(np.arange(len(scores)), weights)
    ours = area(*Ranking.of(scores, positive).curve(weights[None]))[0]
    assert ours == pytest.approx(average_precision_score(positive[copies], scores[copies]))


def test_only_the_order_of_scores_counts() -> None:
    scores, positive = drawn(3)
    assert area(*Ranking.of(scores, positive).curve()) == pytest.approx(
        area(*Ranking.of(np.exp(3 * scores), positive).curve())
    )


def test_equal_scores_reach_the_share_of_the_class_and_perfect_ones_reach_one() -> None:
    _, positive = drawn(4)
    none = Ranking.of(np.zeros(len(positive)), positive).curve()
    assert area(*none)[0] == pytest.approx(positive.mean())
    assert voc07(*none)[0] == pytest.approx(positive.mean())
    all_right = Ranking.of(positive.astype(float), positive).curve()
    assert area(*all_right)[0] == pytest.approx(1)
    assert voc07(*all_right)[0] == 1


def test_the_interval_holds_the_mean_and_is_the_same_again() -> None:
    rankings = [Ranking.of(*drawn(seed, n=400)) for seed in range(3)]
    low, high = mean_interval(rankings, seed=7)
    mean = np.mean([area(*one.curve())[0] for one in rankings])
    assert low < mean < high < low + 0.2
    assert mean_interval(rankings, seed=7) == (low, high)


def test_a_resample_without_a_class_leaves_it_out() -> None:
    one = Ranking.of(np.arange(20.0), np.arange(20) == 19)  # absent from a third of the resamples
    assert mean_interval([one, one], seed=0)[1] == 1
