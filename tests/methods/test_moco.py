"""MoCo v2 and v3: their losses against lightly and closed forms, and what keys must not see."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor, nn

from deepclust.errors import RecipeError
from deepclust.methods.base import Now
from deepclust.methods.moco_v2 import method as moco_v2
from deepclust.methods.moco_v3 import method as moco_v3
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe
from tests.ranks import on_ranks


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Random unit rows."""
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=random))


def v2(*overrides: str) -> moco_v2.Method:
    one = method(recipe("moco-v2", *overrides))
    assert isinstance(one, moco_v2.Method)
    return one


def test_its_loss_is_that_of_lightly_with_a_memory_bank() -> None:
    queries, keys, queue = rows(7, 5), rows(7, 5, 1), rows(20, 5, 2)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(20, 5))
    theirs.memory_bank.bank = queue
    expected = float(theirs(queries, keys))
    assert float(moco_v2.info_nce(queries, keys, queue, 0.2)) == pytest.approx(expected, abs=1e-5)


def test_a_query_that_is_its_key_costs_what_the_formula_says() -> None:
    same, k, t = rows(6, 4), 30, 0.2
    expected = math.log(1 + k * math.exp(-1 / t))
    assert float(moco_v2.info_nce(same, same, torch.zeros(k, 4), t)) == pytest.approx(
        expected, 1e-5
    )


def test_collapsed_keys_cost_the_chance_loss() -> None:
    of, same = recipe("moco-v2"), F.normalize(torch.ones(6, 4))
    loss = moco_v2.info_nce(same, same, same[:1].expand(40, -1), 0.2)
    assert float(loss) == pytest.approx(of.chance_loss)


def test_keys_are_queued_after_the_step_and_the_oldest_leave() -> None:
    one, given = v2("method.queue=30").train(), batch(recipe("moco-v2"))
    before = one.queue.rows.clone()
    one(given)
    assert torch.equal(one.queue.rows, before)
    first = one._fresh[0]
    one.after_step(Now(step=0))
    assert torch.equal(one.queue.rows[:24], first)
    assert torch.equal(one.queue.rows[24:], before[24:])
    one(replace(given, now=Now(step=1)))
    second = one._fresh[0]
    one.after_step(Now(step=1))
    assert torch.equal(one.queue.rows[24:], second[:6])
    assert torch.equal(one.queue.rows[:18], second[6:])


def test_parts_of_a_batch_are_queued_together() -> None:
    one, given = v2().eval(), batch(recipe("moco-v2"))
    parts = [replace(given, crops=tuple(c[i : i + 12] for c in given.crops)) for i in (0, 12)]
    for part in parts:
        one(part)
    one.after_step(Now(step=0))
    whole = one.keys(given.crops[1], Now())
    torch.testing.assert_close(one.queue.rows[:24], whole)


def test_no_gradient_reaches_the_keys() -> None:
    one = v2().train()
    one(batch(recipe("moco-v2")))["loss"].backward()
    assert all(parameter.grad is None for parameter in one.teacher.parameters())
    assert not one._fresh[0].requires_grad


def test_shuffled_keys_come_back_to_their_images() -> None:
    one, crops = v2().eval(), batch(recipe("moco-v2")).crops[1]
    plain = one.teacher.projection(one.teacher.backbone(crops))
    torch.testing.assert_close(one.keys(crops, Now(step=3)), F.normalize(plain))


def test_keys_are_normed_in_groups_that_change_from_step_to_step() -> None:
    one, crops = v2("method.groups=4").train(), batch(recipe("moco-v2")).crops[1]
    groups = one._shuffled(crops, Now(step=0))
    assert [len(group) for group in groups] == [6, 6, 6, 6]
    assert torch.equal(torch.cat(groups), crops[one._order(24, Now())])
    keys = [one.keys(crops, Now(step=step)) for step in (0, 0, 1)]
    assert torch.equal(keys[0], keys[1])
    assert not torch.allclose(keys[0], keys[2], atol=1e-4)


def test_a_norm_never_has_a_single_row() -> None:
    groups = v2("method.groups=100")._shuffled(torch.randn(7, 3, 4, 4), Now())
    assert min(len(group) for group in groups) >= 2


def test_keys_stay_where_no_batch_norm_sees_them() -> None:
    assert moco_v2.groups_of(nn.LayerNorm(3), 8, 2) == 0
    assert moco_v2.groups_of(nn.BatchNorm1d(3), 8, 1) == 8
    assert moco_v2.groups_of(nn.BatchNorm1d(3), 8, 3) == 3
    assert moco_v2.groups_of(nn.SyncBatchNorm(3), 8, 3) == 8


def keys_of(world: World) -> tuple[np.ndarray, np.ndarray]:
    """A rank's keys of its part of a batch in training, and what it encoded."""
    one, crops = method(recipe("moco-v2", "method.groups=1"), world), batch(recipe("moco-v2")).crops
    assert isinstance(one, moco_v2.Method)
    share = crops[1].chunk(world.size)[world.rank]
    encoded = torch.cat(one._shuffled(share, Now()))
    return one.eval().keys(share, Now()).numpy(), encoded.numpy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_encode_each_others_crops_and_get_their_own_keys(ranks: int) -> None:
    parts = on_ranks(ranks, keys_of)
    alone, everything = keys_of(ALONE)
    np.testing.assert_allclose(np.concatenate([keys for keys, _ in parts]), alone, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([crops for _, crops in parts]), everything)
    own = batch(recipe("moco-v2")).crops[1][: 24 // ranks].numpy()
    assert not np.array_equal(np.sort(parts[0][1].ravel()), np.sort(own.ravel()))


def test_v3_collapsed_costs_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4))
    loss = moco_v3.contrast(same, same, ALONE, 0.2)
    assert float(loss) == pytest.approx(math.log(8))
    of = recipe("moco-v3", "train.batch=8")
    assert 4 * of.method.temperature * float(loss) == pytest.approx(of.chance_loss)


def test_v3_is_cross_entropy_over_the_keys_of_the_batch() -> None:
    queries, keys, t = rows(6, 4), rows(6, 4, 1), 0.3
    scores = (queries @ keys.T / t).double()
    expected = -(scores.diagonal() - scores.logsumexp(1)).mean()
    assert float(moco_v3.contrast(queries, keys, ALONE, t)) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_v3_does_not_care_which_crop_is_first() -> None:
    one, given = method(recipe("moco-v3")).eval(), batch(recipe("moco-v3"))
    swapped = replace(given, crops=given.crops[::-1])
    torch.testing.assert_close(one(given)["loss"], one(swapped)["loss"])


def test_a_vit_may_keep_its_patch_projection() -> None:
    of = recipe("moco-v3", "method.freeze_patches=true", "backbone.name=vit_b_32", "data.size=32",
                "data.resize=32")  # fmt: skip
    with torch.device("meta"):
        names = method(of).frozen(Now())
    assert names == ("backbone.net.conv_proj.weight", "backbone.net.conv_proj.bias")
    with pytest.raises(RecipeError, match="freeze_patches: conv4 has no patch projection"):
        method(recipe("moco-v3", "method.freeze_patches=true"))
