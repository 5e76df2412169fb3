"""Sinkhorn: equal to lightly's, to POT's, near the exact program, the same on any ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deepclust.clustering.sinkhorn import Balance, balance, sinkhorn
from deepclust.errors import NumericalError
from deepclust.world import World
from tests.ranks import on_ranks


def draws(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_a_batch_is_lightly_s(iterations: int) -> None:
    from lightly.loss.swav_loss import sinkhorn as theirs

    scores = torch.nn.functional.normalize(draws(64, 30)).float()
    expected = theirs(scores, iterations=iterations, epsilon=0.05)
    ours = sinkhorn(scores / 0.05, iterations=iterations)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # POT, when it is first compiled
@pytest.mark.parametrize("sharpness", [5, 25])
def test_a_whole_set_is_pot_s(sharpness: int) -> None:
    import ot

    log_p = draws(60, 7).log_softmax(1)
    rows, columns = torch.ones(60).double() / 60, torch.tensor([4, 1, 1, 1, 1, 1, 1]).double() / 10
    expected = 60 * ot.bregman.sinkhorn_log(
        rows, columns, -log_p, 1 / sharpness, numItermax=100_000, stopThr=1e-10
    )
    solved = solve(sharpness * log_p, prior=columns)
    torch.testing.assert_close(solved.soft(sharpness * log_p), expected, atol=1e-6, rtol=1e-6)


def test_a_constant_for_each_row_changes_nothing_but_what_few_iterations_leave() -> None:
    scores, constants = 5 * draws(60, 7), 3 * draws(60, 1, seed=1)
    few, many = (
        sinkhorn(scores + constants, iterations=n) - sinkhorn(scores, iterations=n)
        for n in (3, 1000)
    )
    assert float(few.abs().max()) > 1e-3
    assert float(many.abs().max()) < 1e-9


def test_its_cost_nears_that_of_the_exact_program_as_it_sharpens() -> None:
    cost = -draws(60, 6).log_softmax(1)
    slots = cost.repeat_interleave(10, 1).numpy()
    places = linear_sum_assignment(slots)
    exact = slots[places].mean()
    costs = [float((solve(-s * cost).soft(-s * cost) * cost).sum(1).mean()) for s in (5, 25, 100)]
    assert costs[0] > costs[1] > costs[2] >= exact - 1e-6
    assert costs[2] - exact < 0.01 * exact
    labels = solve(-100 * cost).hard(-100 * cost).numpy()
    assert (labels == places[1] // 10).mean() > 0.95


@given(
    st.integers(1, 40), st.integers(1, 9), st.floats(0, 30), st.integers(1, 40),
    st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_rows_sum_to_one_and_tiles_change_no_bit(
    n: int, k: int, scale: float, tile: int, seed: int
) -> None:
    scores = scale * draws(n, k, seed)
    whole, tiled = solve(scores, tolerance=1e-3), solve(scores, tile=tile, tolerance=1e-3)
    assert torch.equal(whole.scalings, tiled.scalings)
    assert torch.allclose(whole.soft(scores).sum(1), torch.ones(n).double())
    if whole.error <= 1e-3:
        assert torch.allclose(whole.soft(scores).mean(0), torch.tensor(1 / k).double(), rtol=2e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_every_number_of_ranks_gives_the_bits_of_one(size: int) -> None:
    scores = 20 * torch.nn.functional.normalize(draws(61, 12)).float()
    alone, whole = sinkhorn(scores), solve(scores, tolerance=1e-6)
    results = on_ranks(size, share, scores)
    assert torch.equal(torch.cat([rows for rows, _ in results]), alone)
    for _, scalings in results:
        assert torch.equal(scalings, whole.scalings)


def share(world: World, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Unequal shares: the first rank has the most rows, the third has none."""
    cuts = [0, *([41, 61, 61] if world.size == 3 else [41, 61] if world.size == 2 else [61])]
    own = scores[cuts[world.rank] : cuts[world.rank + 1]]
    return sinkhorn(own, world=world), solve(own, tolerance=1e-6, world=world).scalings


def test_one_column_takes_all_and_equal_rows_take_the_prior() -> None:
    assert torch.equal(sinkhorn(draws(5, 1)), torch.ones(5, 1).double())
    prior = torch.tensor([0.5, 0.3, 0.2])
    rows = sinkhorn(torch.randn(1, 3).expand(8, 3), prior=prior)
    torch.testing.assert_close(rows, prior.expand(8, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_scores_stay_finite_and_balanced(dtype: torch.dtype) -> None:
    rows = sinkhorn((1e4 * torch.nn.functional.normalize(draws(64, 8))).to(dtype), iterations=50)
    assert torch.isfinite(rows).all()
    assert rows.sum(1).sub(1).abs().max() < 1e-5
    assert rows.mean(0).max() < 0.2


def test_a_prior_of_zero_and_a_forbidden_entry_get_nothing() -> None:
    scores = draws(20, 3)
    scores[:5, 1] = -torch.inf
    rows = solve(scores, prior=torch.tensor([1.0, 1.0, 0.0])).soft(scores)
    assert rows[:, 2].max() == 0
    assert rows[:5, 1].max() == 0
    torch.testing.assert_close(rows.mean(0)[:2], torch.tensor([0.5, 0.5]).double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    scores = draws(20, 3)
    scores[4, 2] = bad
    with pytest.raises(NumericalError, match="cluster 2 are not finite"):
        solve(scores)


def solve(
    scores: Tensor, tile: int = 16, tolerance: float = 1e-9, prior: Tensor | None = None,
    world: World | None = None,
) -> Balance:  # fmt: skip
    return balance(
        lambda: scores.split(tile), scores.shape[1], iterations=3000, tolerance=tolerance,
        prior=prior, world=world or World(),
    )  # fmt: skip
