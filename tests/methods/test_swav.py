"""SwAV's loss against lightly's and its closed forms, its queue, and what holds still."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Batch, Now
from deepclust.methods.parts.multi_crop import swapped
from deepclust.methods.swav.method import Method
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe, share
from tests.ranks import on_ranks

LOCAL = "data.local={count: 2, size: 8}"


def swav(*overrides: str, world: World = ALONE) -> Method:
    torch.manual_seed(0)
    one = method(recipe("swav", *overrides), world)
    assert isinstance(one, Method)
    return one.train()


def given(*overrides: str) -> Batch:
    return batch(recipe("swav", *overrides))


@pytest.mark.parametrize("rows", [0, 40])
def test_the_loss_is_lightlys_with_and_without_a_queue(rows: int) -> None:
    one = swav(LOCAL)
    scores = 0.4 * torch.randn(4, 24, one.prototypes.weight.shape[0])
    past = F.normalize(torch.randn(2, rows, one.config.out), dim=2)
    expected = SwaVLoss()(
        list(scores[:2]), list(scores[2:]), [one.prototypes(old) for old in past] if rows else None
    )
    loss = swapped(one.assign(scores[:2], past), scores / one.config.temperature)
    torch.testing.assert_close(loss, expected[0].detach(), atol=1e-5, rtol=0)


def test_the_whole_step_is_lightlys_on_the_same_network() -> None:
    one, fixed = swav(LOCAL, "method.freeze=0"), given(LOCAL)
    rows = [one.backbone(torch.cat(fixed.crops[i : i + 2])) for i in (0, 2)]
    projected = F.normalize(one.projection(torch.cat(rows)))
    scores = list((projected @ one.prototypes.weight.T).chunk(4))
    expected = SwaVLoss()(scores[:2], scores[2:])[0]
    loss = one(fixed)["loss"]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_collapsed_features_cost_the_logarithm_of_the_prototypes_and_say_so() -> None:
    one = swav()
    with torch.no_grad():
        last = one.projection[-1]
        last.weight.zero_()
        last.bias.fill_(1.0)
        one.prototypes.weight.copy_(torch.ones_like(one.prototypes.weight))
        one.prototypes.normalise()
    told = {name: value.detach() for name, value in one(given()).items()}
    assert float(told["loss"]) == pytest.approx(math.log(one.prototypes.weight.shape[0]), abs=1e-5)
    assert float(told["spread"]) < 1e-3
    assert float(told["mean_entropy"]) == pytest.approx(1, abs=1e-5)


def test_prototypes_are_unit_rows_in_a_step_and_hold_still_at_first() -> None:
    one, fixed = swav("method.freeze=0.5"), given()
    with torch.no_grad():
        one.prototypes.weight.mul_(3)
    one.before_step(fixed)
    torch.testing.assert_close(
        one.prototypes.weight.norm(dim=1), torch.ones(one.prototypes.weight.shape[0])
    )
    assert list(one.frozen(Now(epochs=0.4))) == ["prototypes.weight"]
    assert list(one.frozen(Now(epochs=0.5))) == []


def test_the_queue_fills_from_the_start_and_is_used_from_its_epoch_on() -> None:
    one, fixed = swav("method.queue=60", "method.queue_from=0.5"), given()
    used = []
    for step in range(4):
        now = Now(step, step / 4)
        used.append(one.past(now, 24).shape[1])
        one(replace(fixed, now=now))
        one.after_step(now)
    assert used == [0, 0, 48, 60]
    assert one.queue is not None
    assert torch.allclose(one.queue.rows.norm(dim=1), torch.full((60,), math.sqrt(2)))


def queued(world: World) -> tuple[Tensor, np.ndarray]:
    """The loss and assignments' entropy with a queue that the ranks share."""
    one = swav("method.queue=60", "method.queue_from=0", world=world).eval()
    fixed = share(given(), world)
    for step in range(3):
        told = one(replace(fixed, now=Now(step, step / 4)))
        one.after_step(Now(step))
    assert one.queue is not None
    return told["entropy_of_mean"].detach(), one.queue.rows.numpy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_a_queue(ranks: int) -> None:
    expected, rows = queued(ALONE)
    for entropy, ours in on_ranks(ranks, queued):
        torch.testing.assert_close(entropy, expected, atol=1e-6, rtol=0)
        np.testing.assert_allclose(ours, rows, atol=1e-6)


@pytest.mark.parametrize(("key", "words"), [
    ("method.freeze=1", "keep still in all 1 epochs"),
    ("method.queue_from=1", "would not be used in 1 epochs"),
    ("train.accumulate=2", "contrasts whole batches"),
    ("data.local={count: 2, size: 16}", "data.local.size: 16 is not smaller"),
])  # fmt: skip
def test_what_cannot_work_is_refused(key: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe("swav", key)
