"""Crops that stay with a rank between rounds: nothing is read twice, and no bit changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust import Recipe, pretrain
from deepclust.data.read.dataset import Bad, Loaded
from deepclust.data.read.loader import Loader
from deepclust.stages import kept_crops
from deepclust.stages.kept_crops import KeptCrops
from tests.forks import in_fork
from tests.tiny import assert_same_run, tiny_recipe

SETTINGS = ("train.batch=60", "keep.features=5")


def batch(number: int, first: int, count: int, bad: bool = False) -> Loaded:
    ids = np.arange(first, first + count)
    images = torch.full((count, 3, 4, 4), first, dtype=torch.uint8)
    return Loaded((images,), ids, ids, [Bad(first, "cut off")] if bad else [], number)


def run_and_count(recipe: Path, run: Path, most: int) -> list[int]:
    """Run with so much room for crops; return the samples that each stream of requests asked."""
    kept_crops.MOST = most
    asked: list[int] = []
    inner = Loader.stream

    def stream(self: Loader, requests):  # type: ignore[no-untyped-def]
        asked.append(0)

        def counted():  # type: ignore[no-untyped-def]
            for request in requests:
                asked[-1] += len(request.sample_ids) if request.assignments is None else 0
                yield request

        return inner(self, counted())

    Loader.stream = stream  # type: ignore[method-assign]
    pretrain(recipe, run)
    return [count for count in asked if count]


@pytest.fixture(scope="module")
def recipe(many_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny_recipe(many_shards, *SETTINGS, "train.epochs=2").save(folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def without(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    run = tmp_path_factory.mktemp("without") / "run"
    return run, in_fork(run_and_count, recipe, run, 0)


@pytest.mark.slow
def test_later_rounds_read_only_what_was_not_kept_and_the_bits_stay(
    recipe: Path, without: tuple[Path, list[int]], tmp_path: Path
) -> None:
    plain, asked_without = without
    n, side = max(asked_without), Recipe.load(recipe).data.size
    asked = in_fork(run_and_count, recipe, tmp_path / "run", n // 2 * 3 * side**2)
    assert_same_run(tmp_path / "run", plain)
    rounds = asked_without.count(n)
    assert rounds > 1
    assert [count for count in asked if count > n / 4] == [n, *[n // 2] * (rounds - 1)]


@pytest.mark.slow
def test_two_ranks_keep_what_each_has_read(many_shards: Path, tmp_path: Path) -> None:
    given = tiny_recipe(many_shards, *SETTINGS, "train.epochs=2", "train.ranks=2")
    given.save(tmp_path / "recipe.yaml")
    for name, most in (("without", 0), ("run", 2**30)):
        in_fork(run_and_count, tmp_path / "recipe.yaml", tmp_path / name, most)
    assert_same_run(tmp_path / "run", tmp_path / "without")


def test_a_chunk_is_kept_when_its_last_batch_is_in() -> None:
    kept = KeptCrops(left=10**6)
    first = batch(3, 0, 5)
    kept.offer(first, 8)
    assert not kept.chunks
    kept.offer(batch(3, 5, 3), 8)
    first.images[0].zero_()  # a worker's memory may be used again
    assert [len(one.sample_ids) for one in kept.chunks[3]] == [5, 3]
    assert kept.chunks[3][1].images[0].unique().tolist() == [5]
    assert kept.left == 10**6 - 8 * 48


@pytest.mark.parametrize(("room", "bad"), [(8 * 48 - 1, False), (10**6, True)])
def test_a_chunk_that_does_not_fit_or_has_a_bad_sample_is_not_kept(room: int, bad: bool) -> None:
    kept = KeptCrops(left=room)
    kept.offer(batch(0, 0, 5), 8)
    kept.offer(batch(0, 5, 3, bad), 8)
    assert not kept.chunks
    assert kept.left == room


def test_half_a_chunk_of_a_stream_that_ended_is_forgotten() -> None:
    kept = KeptCrops(left=10**6)
    kept.offer(batch(0, 0, 5), 8)
    kept.offer(batch(1, 8, 8), 8)
    kept.offer(batch(0, 5, 3), 8)
    assert list(kept.chunks) == [1]
