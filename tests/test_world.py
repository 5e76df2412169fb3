from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from deepclust.errors import DeepclustError, DiskError
from deepclust.world import World, derive, generator
from tests.ranks import on_ranks


def test_a_purpose_gives_one_number_and_another_purpose_another() -> None:
    assert derive(1, "view", 2) == derive(1, "view", 2)
    others = [derive(2, "view", 2), derive(1, "view", 3), derive(1, "head", 2), derive(1, "view2")]
    assert len({derive(1, "view", 2), *others}) == 5


def test_derived_numbers_fill_the_range_of_63_bits() -> None:
    numbers = np.array([derive(0, "n", i) for i in range(2000)], np.float64) / 2.0**63
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03


def test_generators_of_one_purpose_agree() -> None:
    assert generator(3, "x").integers(1 << 40) == generator(3, "x").integers(1 << 40)


def test_a_queue_hands_out_every_number_once_and_a_new_world_starts_at_zero() -> None:
    world = World()
    assert [world.ticket("a"), world.ticket("b"), world.ticket("a")] == [0, 0, 1]
    assert World().ticket("a") == 0


def pulled(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, and the gradient of this rank's own function of them (rank + 1 times a sum)."""
    mine = (torch.arange(6.0).view(6, 1) + 1).chunk(world.size)[world.rank].requires_grad_()
    every = world.all_gather_rows(mine)
    ((world.rank + 1) * (every.T @ every).square().sum()).backward()
    assert mine.grad is not None
    return every.detach(), mine.grad


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathered_rows_pass_back_the_sum_of_all_ranks_gradients(size: int) -> None:
    found = on_ranks(size, pulled)
    rows = (torch.arange(6.0).view(6, 1) + 1).requires_grad_()
    (sum(range(1, size + 1)) * (rows.T @ rows).square().sum()).backward()
    for every, _ in found:
        assert torch.equal(every, rows)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), rows.grad)


def shared(world: World) -> list[Any]:
    """What rank 0 has, and what the others had instead."""
    mine = world.is_first
    array = np.arange(6, dtype=np.float32).reshape(2, 3) if mine else None
    return [
        world.broadcast_object([True, "ä", None, [1, 2]] if mine else "other"),
        world.broadcast_object(None if mine else "other"),
        world.broadcast_array(array).tolist(),
        world.broadcast_array(None if mine else np.ones((1, 1), np.float32)),
    ]


def test_values_and_arrays_of_the_first_rank_reach_all_and_no_object_does() -> None:
    there = on_ranks(2, shared)
    assert there[0] == there[1] == [[True, "ä", None, [1, 2]], None, [[0, 1, 2], [3, 4, 5]], None]


def fails(world: World, at: int) -> str:
    try:
        world.raise_all(DiskError("full") if world.rank == at else None, "saving")
    except DeepclustError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_one_ranks_error_stops_all_and_the_others_say_whose_it_was() -> None:
    assert on_ranks(3, fails, 3) == ["went on"] * 3
    first, second, third = on_ranks(3, fails, 1)
    assert second == "DiskError: full"
    assert first == third
    assert first.startswith("FollowedError: saving: rank 1 failed")
    assert fails(World(), 0) == second


def late(world: World, limit: float) -> list[float]:
    """How long each of three barriers took, to which another rank comes after the time limit."""
    waits = []
    for barrier in range(3):
        if world.rank == barrier % world.size:
            time.sleep(2 * limit)
        began = time.monotonic()
        world.barrier()
        waits.append(time.monotonic() - began)
    return waits


def test_ranks_wait_for_a_late_one_longer_than_a_collective_may() -> None:
    first, second = on_ranks(2, late, 0.5, limit=0.5)
    assert first[0] < 0.5 < second[0]
    assert second[1] < 0.5 < first[1]


def ends(world: World) -> None:
    """Rank 1 has an error, and the others wait for it, without a time limit."""
    if world.rank == 1:
        raise DiskError("full")
    world.barrier()


def test_an_error_of_a_rank_ends_a_test_though_the_others_wait_for_it() -> None:
    with pytest.raises(AssertionError, match="DiskError: full"):
        on_ranks(2, ends)
    assert on_ranks(2, fails, 2) == ["went on"] * 2
