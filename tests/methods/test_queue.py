"""The queue of past rows: first in, first out, the same on every rank and after a resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.methods.parts.queue import Queue
from deepclust.world import ALONE, World
from tests.ranks import on_ranks


def numbered(first: int, count: int) -> torch.Tensor:
    """Rows [count, 1] with the numbers from `first` on."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (5, 5), (3, 4)])
def test_the_last_rows_stay_whatever_divides_what(size: int, batch: int) -> None:
    queue = Queue(size, 1, ALONE)
    for step in range(7):
        assert queue.filled(step, batch) == min(size, step * batch)
        queue.push(numbered(step * batch, batch), step)
        last = (step + 1) * batch
        kept = set(range(max(0, last - size), last))
        assert set(queue.rows[: queue.filled(step + 1, batch), 0].tolist()) == kept


def test_a_restored_queue_goes_on_where_it_was() -> None:
    one, other = Queue(10, 1, ALONE), Queue(10, 1, ALONE)
    for step in range(5):
        one.push(numbered(4 * step, 4), step)
        if step == 2:
            other.load_state_dict(one.state_dict())
    for step in (3, 4):
        other.push(numbered(4 * step, 4), step)
    assert torch.equal(one.rows, other.rows)


def test_random_rows_are_unit_rows_of_the_seed() -> None:
    one, same, other = (Queue(8, 4, ALONE, seed) for seed in (0, 0, 1))
    assert torch.equal(one.rows, same.rows)
    assert not torch.equal(one.rows, other.rows)
    torch.testing.assert_close(one.rows.norm(dim=1), torch.ones(8))


def pushed(world: World) -> np.ndarray:
    """A queue of 8 rows after three global batches of 6, shared by the ranks."""
    queue, share = Queue(8, 1, world), 6 // world.size
    for step in range(3):
        queue.push(numbered(6 * step + share * world.rank, share), step)
    return queue.rows.numpy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_all_rows_in_the_order_of_the_global_batch(ranks: int) -> None:
    for rows in on_ranks(ranks, pushed):
        np.testing.assert_array_equal(rows, pushed(ALONE))
