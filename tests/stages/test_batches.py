"""The global batches of training are the same for any number of ranks and parts."""

from __future__ import annotations

import numpy as np
import pytest

from deepclust.data.plan import EpochPlan
from deepclust.data.read.loader import Request
from deepclust.methods.base import Needs
from deepclust.recipe.sections import Data
from deepclust.run.checkpoint import State
from deepclust.stages.batches import Feed
from deepclust.world import World

BATCH, STEPS, OFFSET = 16, 10, 3
PLAN = EpochPlan.build((np.arange(200) % 7).astype(np.int32), 0, 2, BATCH, STEPS)


def requests(rank: int, ranks: int, accumulate: int) -> list[Request]:
    """What one rank reads from step 3 of segment 2 on."""
    data = Data(shards="", size=16)
    feed = Feed(data, Needs(), World(rank, ranks), seed=0, batch=BATCH, parts=accumulate)
    state = State(step=103, segment=2, offset=OFFSET, round=2)
    return list(feed.requests(PLAN, None, state))


def global_batches(ranks: int, accumulate: int, what: str) -> np.ndarray:
    """Ids or positions by step, the ranks' shares one after the other: int [steps, batch]."""
    shares = [
        np.concatenate([getattr(part, what) for part in requests(rank, ranks, accumulate)])
        for rank in range(ranks)
    ]
    return np.concatenate([share.reshape(STEPS - OFFSET, -1) for share in shares], axis=1)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), (2, 1), (4, 1), (2, 4)])
def test_every_step_reads_the_plans_batch_for_any_number_of_ranks(
    ranks: int, accumulate: int
) -> None:
    ids = PLAN.ids.reshape(STEPS, BATCH)[OFFSET:]
    positions = np.arange(OFFSET * BATCH, STEPS * BATCH).reshape(-1, BATCH)
    np.testing.assert_array_equal(global_batches(ranks, accumulate, "sample_ids"), ids)
    np.testing.assert_array_equal(global_batches(ranks, accumulate, "positions"), positions)


def test_views_do_not_depend_on_the_number_of_ranks() -> None:
    """A view is a function of key, position and its own settings alone."""
    told = [
        {(part.key, part.crops) for rank in range(ranks) for part in requests(rank, ranks, 1)}
        for ranks in (1, 2, 4)
    ]
    assert len(told[0]) == 1
    assert told[0] == told[1] == told[2]
