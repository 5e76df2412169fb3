"""The nearest centroid is exact, whatever precision the guess was made in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepclust.clustering import nearest
from deepclust.clustering.nearest import Nearest, half_is_faster, squared_distances
from deepclust.clustering.points import unit_rows


def reference(rows: Tensor, centroids: Tensor) -> Tensor:
    """Float32 distances by difference to every centroid, the first of the smallest."""
    ids = torch.arange(len(centroids))
    columns = [squared_distances(rows, centroids, j.expand(len(rows))) for j in ids]
    return torch.from_numpy(torch.stack(columns, 1).numpy().argmin(1))


def noise(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("half", [True, False])
@given(
    n=st.integers(1, 600), dim=st.integers(1, 70), k=st.integers(1, 90), seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 3.0, 1e4]), spread=st.sampled_from([1e-22, 1e-20, 1e-3, 1.0, 1e3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_row_goes_to_the_smallest_distance(
    half: bool, n: int, dim: int, k: int, seed: int, offset: float, spread: float
) -> None:
    rows, centroids = (spread * noise(m, dim, seed + m) + offset for m in (n, k))
    found = Nearest(centroids, half)(rows)
    torch.testing.assert_close(found, reference(rows, centroids))


@pytest.mark.parametrize("half", [True, False])
def test_rows_far_from_centroids_that_are_close_together(half: bool) -> None:
    centroids = 1e-6 * noise(40, 32, 0)
    rows = torch.cat([noise(300, 32, 1), 1e-6 * noise(300, 32, 2)])
    torch.testing.assert_close(Nearest(centroids, half)(rows), reference(rows, centroids))


@pytest.mark.parametrize("half", [True, False])
def test_ties_and_near_ties_are_decided_by_float32_differences(half: bool) -> None:
    base = unit_rows(noise(40, 64, 0))
    close = base * (1 + 2.0**-12)
    centroids = torch.cat([base, close, base])  # every one twice, and once almost
    rows = torch.cat([base, close, unit_rows(noise(300, 64, 1))])
    found = Nearest(centroids, half)(rows)
    torch.testing.assert_close(found, reference(rows, centroids))
    torch.testing.assert_close(found[:80], torch.arange(80))


def test_crowds_of_candidates_are_compared_in_bounded_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nearest, "PAIRS", 50)
    monkeypatch.setattr(nearest, "CROWD", 3)
    centroids = 1 + 1e-4 * noise(60, 8, 0)
    rows = torch.cat([1 + 1e-4 * noise(500, 8, 1), noise(100, 8, 2)])
    torch.testing.assert_close(Nearest(centroids, True)(rows), reference(rows, centroids))


def test_a_tile_gives_what_its_rows_give_alone() -> None:
    rows, centroids = unit_rows(noise(500, 96, 0)), unit_rows(noise(50, 96, 1))
    search = Nearest(centroids, True)
    alone = torch.cat([search(row[None]) for row in rows])
    torch.testing.assert_close(search(rows), alone)


def test_rows_that_overflow_get_some_centroid_and_no_crash() -> None:
    centroids = noise(5, 8, 0)
    found = Nearest(centroids, True)(1e30 * noise(10, 8, 1))
    assert int(found.min()) >= 0
    assert int(found.max()) < 5


@pytest.mark.parametrize("half", [True, False])
def test_columns_that_fill_up_a_product_win_no_row_of_any_length(half: bool) -> None:
    for k in range(1, 10):
        search = Nearest(noise(k, 5, k), half)
        assert search.packed.shape[1] in (8, 16)
        for power in range(0, 39, 2):
            assert int(search(10.0**power * noise(50, 5, power)).max()) < k


def test_whether_half_precision_pays_is_asked_once() -> None:
    assert half_is_faster() in (True, False)
    assert half_is_faster() is half_is_faster()
