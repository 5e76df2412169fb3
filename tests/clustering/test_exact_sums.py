"""Sums on a grid are the same in any order, and lose nothing that a float32 would hold."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.clustering.exact_sums import (
    PARTIALS,
    ClusterSums,
    grid_of,
    on_grid,
    sums_by_id,
)
from tests.pretended_device import pretended


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200), st.randoms())
@settings(max_examples=50, deadline=None)
def test_any_order_gives_the_same_bits_and_no_addition_rounds(values: list[float], how) -> None:
    grid = grid_of(100.0, len(values))
    even = on_grid(torch.tensor(values, dtype=torch.float64), grid).tolist()
    shuffled = list(even)
    how.shuffle(shuffled)
    assert sum(even) == sum(shuffled)
    assert Fraction(sum(even)) == sum(Fraction(value) for value in even)
    assert max(abs(a - b) for a, b in zip(values, even, strict=True)) <= grid / 2


def test_half_precision_rows_up_to_a_hundred_million_are_on_the_grid_already() -> None:
    grid = grid_of(1.0, 100_000_000)
    rows = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float16))
    assert torch.equal(on_grid(rows.double(), grid), rows.double())


def test_grids_of_no_rows_and_of_infinite_rows_are_defined() -> None:
    assert grid_of(0.0, 5) == grid_of(1.0, 0) == 0.0
    assert math.isinf(grid_of(math.inf, 5))
    assert on_grid(torch.ones(3, dtype=torch.float64), 0.0).tolist() == [1, 1, 1]


def test_weighted_sums_by_cluster_equal_a_slow_reference() -> None:
    draws = np.random.default_rng(0)
    rows, ids = draws.standard_normal((200, 5)).astype(np.float32), draws.integers(0, 4, 200)
    weights = draws.uniform(0, 2, 200)
    sums = ClusterSums(torch.zeros(2, 4, 5, dtype=torch.float64), grid_of(12.0, 200), 200)
    for part in np.array_split(np.arange(200), 7):
        sums.add(*(torch.from_numpy(a[part]) for a in (ids, rows, weights)))
    slow = np.stack([(rows * weights[:, None])[ids == j].sum(0) for j in range(4)])
    np.testing.assert_allclose(sums.partials.sum(0), slow, rtol=1e-12, atol=1e-12)


def test_a_card_adds_what_moved_to_the_same_bits_without_a_wait() -> None:
    random = torch.Generator().manual_seed(3)
    rows, weights = torch.randn(50, 4, generator=random), torch.rand(50, generator=random).double()
    now, before = torch.randint(5, (2, 50), generator=random)
    grid = grid_of(float(rows.abs().max()), 50)

    def sums(device: str) -> torch.Tensor:
        zeros = torch.zeros(PARTIALS, 5, 4, dtype=torch.float64, device=device)
        both = ClusterSums(zeros, grid, 50)
        both.add(now.to(device), rows.to(device), weights.to(device), before.int().to(device))
        return both.partials

    expected = sums("cpu")
    with pretended() as log:
        given = sums("cuda")
        counts = sums_by_id(now.to("cuda"), 5)
        assert not [wait for wait in log.waits if "exact_sums" in str(wait)]
        assert torch.equal(given.cpu(), expected)
        assert torch.equal(counts.cpu(), torch.bincount(now, minlength=5))
