"""Signs of collapse: their closed forms, and what a user is told of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.methods.parts.monitors import prototypes_used, spread, target_entropies
from deepclust.run.collapse import LINES, Watch, collapsed
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe
from tests.ranks import on_ranks


def test_the_spread_is_0_for_one_direction_and_1_for_all() -> None:
    torch.manual_seed(0)
    assert float(spread(torch.ones(64, 16) * torch.rand(64, 1))["spread"]) < 1e-3
    assert float(spread(torch.randn(4096, 16))["spread"]) == pytest.approx(1, abs=0.01)
    assert spread(torch.randn(1, 16)) == {}


@pytest.mark.parametrize(
    ("targets", "of_mean", "of_rows"),
    [(torch.eye(8), 1, 0), (torch.eye(8)[:1].expand(5, 8), 0, 0), (torch.ones(5, 8) / 8, 1, 1)],
    ids=["balanced", "one target", "uniform"],
)
def test_the_entropies_of_targets(targets: torch.Tensor, of_mean: float, of_rows: float) -> None:
    told = target_entropies(targets, ALONE)
    assert float(told["entropy_of_mean"]) == pytest.approx(of_mean, abs=1e-6)
    assert float(told["mean_entropy"]) == pytest.approx(of_rows, abs=1e-6)


def of_share(world: World) -> float:
    """Every rank has one target of its own."""
    one = F.one_hot(torch.tensor([world.rank]), 4).float()
    return float(target_entropies(one, world)["entropy_of_mean"])


def test_the_mean_target_is_that_of_all_ranks() -> None:
    assert on_ranks(2, of_share) == pytest.approx([math.log(2) / math.log(4)] * 2)


def test_used_prototypes_are_counted_against_what_is_possible() -> None:
    assert float(prototypes_used(torch.eye(4))["prototypes_used"]) == 1
    assert float(prototypes_used(torch.eye(4)[:2])["prototypes_used"]) == 1
    assert float(prototypes_used(torch.eye(4)[:1].expand(4, 4))["prototypes_used"]) == 0.25


@pytest.mark.parametrize("name", ["sela", "swav", "dino", "byol", "moco-v2", "simclr"])
def test_every_method_that_can_collapse_tells_a_spread(name: str) -> None:
    told = method(recipe(name)).loss(batch(recipe(name))).told
    assert 0 < float(told["spread"]) < 1.5


@pytest.mark.parametrize(("bad", "words"), [
    ({"spread": 0.01}, "same projection"), ({"entropy_of_mean": 0.05}, "have one target"),
    ({"mean_entropy": 0.999}, "nearly uniform"), ({"prototypes_used": 0.03}, "few prototypes"),
])  # fmt: skip
def test_a_sign_is_told_once_it_lasts(bad: dict[str, float], words: str) -> None:
    good = {
        "loss": 1.0, "spread": 0.8, "entropy_of_mean": 0.7, "mean_entropy": 0.2,
        "prototypes_used": 0.24,
    }  # fmt: skip
    assert collapsed([good] * 9) is None
    assert collapsed([{**good, **bad}] * (LINES - 1)) is None
    assert words in str(collapsed([good] * 9 + [{**good, **bad}] * LINES))
    assert collapsed([{"loss": 1.0, "spread": None}] * 9) is None


def test_a_sign_is_told_when_it_begins_and_not_again_while_it_lasts() -> None:
    watch, bad, good = Watch(), {"spread": 0.01}, {"spread": 0.8}
    told = [watch.note(line) is not None for line in [bad] * 9 + [good] * 9 + [bad] * 9]
    assert [i for i, one in enumerate(told) if one] == [LINES - 1, 18 + LINES - 1]
