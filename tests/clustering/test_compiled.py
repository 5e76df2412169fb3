"""Compiled loops do what slow ones do, for any shape, and without a folder to keep them in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.clustering.compiled import (
    above,
    add_rows,
    best_columns,
    closest,
    compiled,
    floors_of,
)
from deepclust.clustering.exact_sums import MAGIC, grid_of, into_partials

MOST = 3


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32])
@given(m=st.integers(0, 40), k=st.integers(1, 300), top=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_scores_above_a_floor_are_those_of_a_slow_search(
    kind: type, m: int, k: int, top: int, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    scores, floors = draws.integers(0, 1000, (m, k)).astype(kind), np.full(m, 1000 - top, kind)
    nearest, rows, starts, ids, rest = above(scores, floors, MOST)
    found = [np.flatnonzero(line >= 1000 - top).tolist() for line in scores]
    assert nearest.tolist() == [one[0] if len(one) == 1 else 0 for one in found]
    assert rows.tolist() == [row for row, one in enumerate(found) if 1 < len(one) <= MOST]
    assert rest.tolist() == [row for row, one in enumerate(found) if not 0 < len(one) <= MOST]
    several = [ids[a:b].tolist() for a, b in pairwise(starts)]
    assert several == [one for one in found if 1 < len(one) <= MOST]


@pytest.mark.parametrize(("half", "integer"), [(True, torch.int16), (False, torch.int32)])
def test_a_floor_is_below_every_score_that_can_be_the_best(
    half: bool, integer: torch.dtype
) -> None:
    kind = torch.bfloat16 if half else torch.float32
    scores = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)).to(kind)
    lengths, bounds = np.full(500, 0.5, np.float32), (0.01, 0.002, 0.001, 1.0, 2.0**-8)
    floors = floors_of(scores.view(integer).numpy(), lengths, bounds)
    best = scores.float().amax(1).double()
    lowest = best - 2.02 * (0.01 * 0.5 + 0.002 + 0.001 * 1.5**2 + 2.0**-8 * best.abs())
    given_up = floors == np.iinfo(floors.dtype).max
    assert np.array_equal(given_up, (lowest <= 0).numpy())
    floats = torch.from_numpy(floors[~given_up]).view(kind).double()
    assert bool((floats <= lowest[~given_up]).all())
    assert bool((floats >= lowest[~given_up] * (1 - 2.0**-6)).all())


@given(
    m=st.integers(0, 40), k=st.integers(1, 300), near=st.integers(0, 24), seed=st.integers(0, 99)
)
@settings(max_examples=100, deadline=None)
def test_a_best_column_is_the_only_one_above_its_floor_unless_its_row_is_open(
    m: int, k: int, near: int, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    scores = draws.standard_normal((m, k)).astype(np.float32)
    if k > 1:  # a second one just above or below the best, as far as 2^-near of it
        best = scores.max(1) * (1 + draws.choice([-1, 0, 1], m) * 2.0**-near)
        scores[np.arange(m), draws.integers(0, k, m)] = best
    lengths, bounds = np.full(m, 0.5, np.float32), (1e-7, 1e-7, 1e-7, 1.0, 2.0**-22)
    whole = scores.view(np.int32)
    nearest, rows = best_columns(whole, lengths, bounds)
    reach = (whole >= floors_of(whole, lengths, bounds)[:, None]).sum(1)
    are_open = np.isin(np.arange(m), rows)
    assert are_open[reach != 1].all()
    assert (reach[~are_open] == 1).all()
    assert np.array_equal(nearest[~are_open], scores[~are_open].argmax(1))
    ranked = np.sort(scores[are_open & (reach == 1)], 1)  # open for the nine low bits alone
    assert (ranked[:, -2:-1] >= ranked[:, -1:] * (1 - 2.0**-13)).all()


def test_rows_with_scores_that_are_no_numbers_are_open() -> None:
    scores = np.array([[1, np.nan], [np.inf, 1], [-1, -2], [2, 1]], np.float32)
    _, rows = best_columns(scores.view(np.int32), np.ones(4, np.float32), (0.0, 0.0, 0.0, 1.0, 0.0))
    assert rows.tolist() == [0, 1, 2]


def test_the_closest_is_that_of_float64_and_a_tie_is_never_certain() -> None:
    draws = np.random.default_rng(0)
    rows, centroids = (draws.standard_normal((n, 30)).astype(np.float32) for n in (50, 9))
    centroids[8] = centroids[2]
    starts, ids = np.arange(0, 451, 9), np.tile(np.arange(9), 50)
    winners, certain = closest(rows, starts, ids, centroids, 1e-5)
    distances = ((rows[:, None].astype(float) - centroids) ** 2).sum(2)
    assert winners.tolist() == distances.argmin(1).tolist()
    assert not certain[winners == 2].any()
    assert certain[winners != 2].all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_rows_are_added_to_the_bits_of_torch(weighted: bool, moved: bool) -> None:
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 7, generator=random) * torch.rand(300, 1, generator=random) ** 9
    weights = torch.rand(300, generator=random).double() if weighted else None
    now, before = torch.randint(5, (2, 300), generator=random)
    grid = grid_of(float(rows.abs().max()), 300)
    wide = rows.double() if weights is None else rows * weights[:, None]
    parts = into_partials(wide.clone(), grid, 300)
    expected = torch.zeros(2, 5, 7, dtype=torch.float64).index_add_(1, now, parts)
    if moved:
        expected.index_add_(1, before, parts, alpha=-1)
    sums = np.zeros((2, 5, 7))
    given = (None if weights is None else weights.numpy(), before.numpy() if moved else None)
    magic = MAGIC * grid, MAGIC * grid_of(grid, 300)
    for part in (slice(200, 300), slice(0, 200)):  # in any order
        some = (None if one is None else one[part] for one in given)
        add_rows(sums, magic, now.numpy()[part], rows.numpy()[part], *some)
    np.testing.assert_array_equal(sums, expected.numpy())


def test_without_a_folder_that_can_be_written_a_process_compiles_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = numba.njit

    def refused(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return honest(**options)

    monkeypatch.setattr(numba, "njit", refused)
    assert compiled()(lambda number: number + 1)(1) == 2
