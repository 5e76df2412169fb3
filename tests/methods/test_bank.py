"""The bank holds, for every sample, the row of the last place where the plan had it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.methods.parts.bank import Bank
from deepclust.run import checkpoint, checkpoint_writer
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from deepclust.world import World
from tests.methods.cases import batch, method, recipe
from tests.ranks import on_ranks

N, PARTS, DIM, BATCH, STEPS = 41, 2, 5, 12, 6


def steps() -> list[tuple[np.ndarray, np.ndarray]]:
    """Sample ids, many of them doubled in a batch, and their rows."""
    random = np.random.default_rng(0)
    ids = random.integers(0, N, (STEPS, BATCH))
    ids[0, :4] = 7
    return [(row, random.normal(size=(PARTS, BATCH, DIM)).astype(np.float16)) for row in ids]


def expected(done: int = STEPS) -> np.ndarray:
    """What a loop over all places of the plan leaves."""
    rows = np.zeros((N, PARTS, DIM), np.float16)
    for ids, values in steps()[:done]:
        for place, sample in enumerate(ids):
            rows[sample] = values[:, place]
    return rows


def train(bank: Bank, world: World, accumulate: int, chosen: slice) -> None:
    """Note and flush some steps, this rank's share in parts."""
    for ids, values in steps()[chosen]:
        share = np.split(np.arange(BATCH), world.size)[world.rank]
        for part in np.split(share, accumulate):
            bank.note(torch.from_numpy(ids[part]), torch.from_numpy(values[:, part]))
        bank.flush()


def fill(world: World, accumulate: int) -> np.ndarray:
    """A rank's slice after all steps."""
    bank = Bank(N, PARTS, DIM, world)
    train(bank, world, accumulate, slice(None))
    return bank.rows.numpy()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_last_place_of_a_sample_wins_on_any_number_of_ranks(
    ranks: int, accumulate: int
) -> None:
    parts = on_ranks(ranks, fill, accumulate)
    np.testing.assert_array_equal(np.concatenate(parts), expected())


def test_more_ranks_than_samples_leave_some_without_rows() -> None:
    sizes = [len(part) for part in on_ranks(3, small)]
    assert sizes == [1, 1, 0]


def small(world: World) -> np.ndarray:
    bank = Bank(2, 1, 3, world)
    bank.note(torch.tensor([world.rank % 2]), torch.ones(1, 1, 3))
    bank.flush()
    return bank.rows.numpy()


def go_on(world: World, folder: str, token: str, done: int) -> np.ndarray:
    """Load a bank after `done` steps from any number of ranks, do two more, and save it."""
    run, bank = Run(Path(folder), token), Bank(N, PARTS, DIM, world)
    owned = {"model/bank.rows": bank.range}
    if done:
        saved = checkpoint.load_owned(run.checkpoints()[-1], owned)
        bank.rows.copy_(saved["model/bank.rows"])
    train(bank, world, 1, slice(done, done + 2))
    slices = {"model/bank.rows": (bank.rows, bank.range)}
    checkpoint_writer.save(run, State(step=done + 2), {"model": {}}, 9, slices, world)
    return bank.rows.numpy()


def test_a_bank_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    for number, ranks in enumerate((1, 2, 3)):
        with hold(tmp_path) as token:
            parts = on_ranks(ranks, go_on, str(tmp_path), token, 2 * number)
        np.testing.assert_array_equal(np.concatenate(parts), expected(2 * number + 2))


def test_a_first_pass_gives_all_parts_its_row() -> None:
    bank, rows = Bank(N, PARTS, DIM, World()), np.ones((N, DIM), np.float16)
    assert not bank.is_filled
    bank.fill(rows)
    assert bank.is_filled
    np.testing.assert_array_equal(bank.rows.numpy(), np.ones((N, PARTS, DIM), np.float16))


def test_a_step_leaves_the_projections_of_its_full_size_crops() -> None:
    of = recipe("deepcluster-v2")
    one, fixed = method(of).eval(), batch(of)
    one(fixed)
    one.after_step(fixed.now)
    for part in range(2):
        rows = one.clustered(fixed.crops[part]).detach().half()
        torch.testing.assert_close(one.bank.rows[:, part], rows, atol=1e-3, rtol=0)
