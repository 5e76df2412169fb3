"""One round's k-means: several heads, spherical rows, progress, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.options import Given, Progress
from deepclust.recipe.declare import Refresh
from deepclust.recipe.sections import ClusterSection
from deepclust.stages import round_kmeans
from deepclust.stages.cluster import head_seeds
from deepclust.stages.round_kmeans import RoundClusters, RoundTask, cluster_round
from deepclust.world import World, derive
from tests.clustering.test_sharded_points import rows
from tests.ranks import on_ranks


class Silent:
    """A report that nobody reads."""

    def event(self, name: str, **fields: Any) -> None:
        """Drop it."""

    def progress(self, **fields: Any) -> None:
        """Drop it."""

    def alive(self) -> None:
        """Drop it."""


def solve(
    world: World, refresh: Refresh, seen: list[tuple[int, Progress]] | None = None, **config: Any
) -> list[RoundClusters]:
    """Cluster 300 rows, of which every tenth is excluded."""
    x = rows(300).astype(np.float16)
    section = ClusterSection.model_validate({"k": 12, "iterations": 4, **config})
    valid = np.flatnonzero(np.arange(300) % 10)
    note = [] if seen is None else seen
    task = RoundTask(
        x, valid, section, refresh, None, head_seeds(7, 2, refresh.heads),
        torch.device("cpu"), world, Silent(), lambda head, one: note.append((head, one)),
    )  # fmt: skip
    return cluster_round(task)[0]


def test_each_head_is_a_k_means_of_the_same_rows_from_its_seed() -> None:
    heads = solve(World(), Refresh(heads=3))
    x, valid = rows(300).astype(np.float16), np.flatnonzero(np.arange(300) % 10)
    for head, clusters in enumerate(heads):
        purpose = () if head == 0 else ("head", head)
        alone = kmeans(x[valid], 12, iterations=4, seed=derive(7, "cluster", 2, *purpose))
        np.testing.assert_array_equal(clusters.assignments[valid], alone.assignments)
        np.testing.assert_array_equal(clusters.centroids, alone.centroids)
        assert (clusters.assignments[::10] == -1).all()
        assert np.isnan(clusters.distances[::10]).all()
    assert not np.array_equal(heads[1].assignments, heads[2].assignments)


def test_the_first_of_several_heads_is_the_only_one_of_a_round_with_one() -> None:
    one, three = solve(World(), Refresh()), solve(World(), Refresh(heads=3))
    np.testing.assert_array_equal(one[0].assignments, three[0].assignments)


@pytest.mark.parametrize(
    ("levels", "config"), [(1, {}), (2, {"supers": 3}), (1, {"init": "two-level"})]
)
def test_any_number_of_ranks_gives_the_same_heads(levels: int, config: dict[str, Any]) -> None:
    refresh = Refresh(heads=2, levels=levels)
    alone = solve(World(), refresh, **config)
    for heads in on_ranks(2, solve_quietly, refresh, config):
        for ours, theirs in zip(heads, alone, strict=True):
            np.testing.assert_array_equal(ours.assignments, theirs.assignments)
            np.testing.assert_array_equal(ours.centroids, theirs.centroids)


def solve_quietly(world: World, refresh: Refresh, config: dict[str, Any]) -> list[RoundClusters]:
    return solve(world, refresh, **config)


def test_spherical_rounds_have_centroids_of_unit_norm() -> None:
    (clusters,) = solve(World(), Refresh(spherical=True))
    np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, atol=1e-5)
    (plain,) = solve(World(), Refresh())
    assert not np.allclose(np.linalg.norm(plain.centroids, axis=1), 1, atol=1e-2)


def test_progress_says_which_head_it_is_of() -> None:
    seen: list[tuple[int, Progress]] = []
    solve(World(), Refresh(heads=2), seen)
    heads = [head for head, _ in seen]
    assert heads == sorted(heads)
    assert set(heads) == {0, 1}
    ends = [one.pass_ == one.of for _, one in seen]
    assert sum(ends) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_start_for_all_ranks_is_made_on_the_first_ones_device(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    devices: list[torch.device] = []

    class Whole:
        def __init__(self, rows: np.ndarray, *, device: torch.device, alive: Any) -> None:
            devices.append(device)

        def select(self, ids: np.ndarray) -> Whole:
            return self

    class Two(World):
        def barrier(self) -> None: ...

        def broadcast_array(self, array: Any) -> Any:
            return array

    monkeypatch.setattr(round_kmeans, "ArrayPoints", Whole)
    monkeypatch.setattr(round_kmeans, "given_start", lambda points, options: Given())
    section = ClusterSection.model_validate({"k": 12, "init": "two-level"})
    gpu = torch.device("cuda", 3)
    task = RoundTask(
        rows(30), np.arange(30), section, Refresh(), None, (0,), gpu, Two(rank, 2), Silent(),
        lambda head, one: None,
    )  # fmt: skip
    round_kmeans._given(task, None, 0)  # type: ignore[arg-type]
    assert devices == [gpu] * (rank == 0)
