"""Rows and starts on a device with its own memory, shown on a CPU that says it has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust.clustering import array_points
from deepclust.clustering import init as starts
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import kmeans, solve_kmeans
from deepclust.clustering.options import KMeansOptions
from deepclust.recipe.declare import Refresh
from tests.clustering.test_sharded_points import rows
from tests.stages.test_round_kmeans import Silent, solve


class Told(Silent):
    """A report that keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def event(self, name: str, **fields: object) -> None:
        """Keep the text."""
        self.warnings.append(str(fields["text"]))


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> list[int]:
    """Let the CPU have so many bytes of memory of its own; the list counts questions."""
    asked: list[int] = []

    def answer(device: torch.device) -> int:
        asked.append(free)
        return free

    monkeypatch.setitem(array_points.MEMORY, "cpu", answer)
    return asked


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """2000 half-precision rows in a file."""
    np.save(tmp_path / "rows.npy", rows(2000).astype(np.float16))
    return np.load(tmp_path / "rows.npy", mmap_mode="r")


def test_rows_that_fit_become_resident_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, mapped: np.ndarray
) -> None:
    room(monkeypatch, 2 * mapped.nbytes)
    points = ArrayPoints(mapped)
    assert isinstance(points.rows, Tensor)
    assert points.rows.dtype == torch.float16
    assert points.note() is None


def test_rows_that_do_not_fit_stay_half_and_say_so_and_a_part_of_them_moves_in(
    monkeypatch: pytest.MonkeyPatch, mapped: np.ndarray
) -> None:
    room(monkeypatch, mapped.nbytes // 2)
    halves: list[bool] = []
    search = array_points.SEARCHES["torch"]
    monkeypatch.setitem(
        array_points.SEARCHES, "torch", lambda c, half: (halves.append(half), search(c, half))[1]
    )
    weights = np.linspace(0.5, 1, len(mapped))
    points = ArrayPoints(mapped, weights=weights)
    assert isinstance(points.rows, np.ndarray)
    assert "read from disk" in (points.note() or "")
    ids = np.arange(1, 2000, 5)
    before = points.select(ids)
    inside = points.select(ids).move_in()
    assert isinstance(inside.rows, Tensor)
    assert (inside.ids, inside.note()) == (None, None)
    centroids = torch.from_numpy(rows(12))
    there, here = inside.assign_to(centroids), before.assign_to(centroids)
    assert torch.equal(there.cluster_ids, here.cluster_ids)
    assert torch.equal(there.sums, here.sums)
    assert torch.equal(there.mass, here.mass)
    assert halves == [True, True]


def test_memory_is_asked_for_after_what_torch_keeps_unused_was_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (calls.append("ask"), (1000, 2000))[1]
    )
    assert array_points.MEMORY["cuda"](torch.device("cuda", 0)) == 800
    assert calls == ["empty", "ask"]


@pytest.mark.parametrize("levels", [1, 2])
def test_a_round_of_rows_that_do_not_fit_is_the_same_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, levels: int
) -> None:
    from deepclust.world import World
    from tests.stages import test_round_kmeans

    config = {"supers": 3} if levels == 2 else {}
    fits = solve(World(), Refresh(levels=levels), **config)
    told = Told()
    monkeypatch.setattr(test_round_kmeans, "Silent", lambda: told)
    room(monkeypatch, 2000)
    small = solve(World(), Refresh(levels=levels), **config)
    np.testing.assert_array_equal(fits[0].assignments, small[0].assignments)
    np.testing.assert_array_equal(fits[0].centroids, small[0].centroids)
    assert [text for text in told.warnings if "read from disk" in text]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_start_that_never_waits_for_the_device_chooses_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    x = rows(3000)
    weights = np.random.default_rng(0).random(3000) if weighted else None
    points = ArrayPoints(x, weights=weights)
    fixed = torch.from_numpy(rows(3) + 1) if weighted else torch.zeros(0, x.shape[1])
    here = starts.plus_plus(points, 40, fixed, seed=5)
    monkeypatch.setattr(starts, "_draw_here", starts._draw_there)
    there = starts.plus_plus(points, 40, fixed, seed=5)
    assert torch.equal(here, there)


def test_it_notices_at_the_end_where_distinct_rows_have_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.repeat(rows(4), 30, axis=0)
    monkeypatch.setattr(starts, "_draw_here", starts._draw_there)
    assert kmeans(x, 4, init="k-means++").inertia == 0.0
    options = KMeansOptions(3, 2, 0, init="k-means++")
    assert len(solve_kmeans(ArrayPoints(x), options).centroids) == 3


def test_a_long_gather_from_a_memory_map_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, mapped: np.ndarray
) -> None:
    signs: list[int] = []
    monkeypatch.setattr(array_points, "GATHERED", 64)
    points, ids = ArrayPoints(mapped, alive=lambda: signs.append(1)), torch.randperm(2000)[:500]
    assert torch.equal(points.gather(ids), torch.from_numpy(mapped[ids.numpy()]).float())
    assert len(signs) == 8
