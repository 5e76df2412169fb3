"""Virtual adversarial training, against its formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.methods.base import Batch, Method, Now
from deepclust.methods.terms.vat.noise import normal
from deepclust.methods.terms.vat.term import Term, divergence, steepest, unit
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe, share
from tests.ranks import on_ranks

KEYS = "terms={vat: {weight: 1, eps: 1}}"


def carrier(world: World = ALONE) -> Method:
    return method(recipe("supervised", KEYS), world)


def value(one: Method, given: Batch) -> Tensor:
    """The term alone."""
    with torch.random.fork_rng():
        return cast(Term, one.terms["vat"])(one, given, one.loss(given))


def linear(scale: float, classes: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(20, classes)
    with torch.no_grad():
        layer.weight *= scale
    return layer


def test_the_direction_of_a_linear_classifier_is_the_difference_of_its_rows() -> None:
    layer, images = linear(0.3), torch.randn(50, 20)
    start = 1e-2 * unit(normal(1, torch.arange(50), 20))
    steep = steepest(layer, images, layer(images).detach().log_softmax(1), start)
    away = F.normalize(layer.weight[0] - layer.weight[1], dim=0).detach()
    assert (steep @ away).abs().min().item() > 0.999
    assert torch.allclose(steep.norm(dim=1), torch.ones(50))


def test_the_search_is_as_good_as_in_double_precision_under_autocast_and_lost_without_its_island(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, given = carrier().eval(), batch(recipe("supervised"))
    double, searches = copy.deepcopy(one).double(), []

    def watched(*search: Any) -> Tensor:
        searches.append((search, steepest(*search)))
        return searches[-1][1]

    monkeypatch.setattr("deepclust.methods.terms.vat.term.steepest", watched)
    with torch.autocast("cpu", torch.bfloat16):
        value(one, given)
        (search, island), *_ = searches
        outside = steepest(*search)
    images, start = search[1].double(), search[3].double()
    wide = lambda rows: double.classify(double.backbone(rows))  # noqa: E731
    exact = steepest(wide, images, wide(images).detach().log_softmax(1), start)
    likeness = [F.cosine_similarity(r.flatten(1), exact.flatten(1)) for r in (island, outside)]
    assert likeness[0].min() > 0.99
    assert likeness[1].mean() < 0.5


def test_the_divergence_of_twice_the_change_is_four_times_as_large() -> None:
    layer, images = linear(0.3, classes=5), torch.randn(50, 20)
    wanted = layer(images).detach().log_softmax(1)
    away = steepest(layer, images, wanted, 1e-2 * unit(torch.randn(50, 20)))
    once, twice = (divergence(wanted, layer(images + e * away)).item() for e in (0.05, 0.1))
    assert twice / once == pytest.approx(4, rel=0.05)


def test_the_change_found_is_worse_for_the_answers_than_a_random_one() -> None:
    one, given = carrier().train(), batch(recipe("supervised"))
    images = given.crops[0]
    with torch.no_grad():
        wanted = one.classify(one.backbone(images)).log_softmax(1)
        change = unit(torch.randn_like(images))
        random = divergence(wanted, one.classify(one.backbone(images + change))) / len(images)
    assert value(one, given) > 3 * random


def test_unit_changes_of_slopes_that_would_underflow_are_unit() -> None:
    rows = torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [3.0, -4.0]])
    assert torch.allclose(unit(rows), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8]]))


def test_noise_is_normal_and_belongs_to_the_sample() -> None:
    drawn = normal(7, torch.arange(200), 500)
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    assert abs(float(drawn.pow(4).mean()) - 3) < 0.1
    assert drawn.isfinite().all()
    assert torch.equal(normal(7, torch.tensor([5, 5, 199]), 500), drawn[[5, 5, 199]])
    assert not torch.equal(normal(8, torch.arange(200), 500), drawn)


def test_running_statistics_and_gradients_are_untouched_by_the_search() -> None:
    one, given = carrier().train(), batch(recipe("supervised"))
    output = one.loss(given)
    before = {n: b.clone() for n, b in one.named_buffers()}
    term = cast(Term, one.terms["vat"])
    result = term(one, given, output)
    assert all(torch.equal(before[n], b) for n, b in one.named_buffers())
    assert all(p.grad is None for p in one.parameters())
    assert all(m.track_running_stats for m in one.modules() if isinstance(m, nn.BatchNorm2d))
    result.backward()
    assert one.get_parameter("classifier.weight").grad is not None


def test_it_is_an_island_of_float32_under_autocast() -> None:
    one, given = carrier().train(), batch(recipe("supervised"))
    plain = value(one, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value(one, given), plain)


class Dropping(nn.Module):
    """A network whose dropout changes answers far more than the change of an image does."""

    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(images.flatten(1), 0.5, self.training)[:, :384]


def test_every_pass_has_the_same_dropout() -> None:
    one, given = carrier().train(), batch(recipe("supervised"))
    one.backbone.net = Dropping()
    cast(Term, one.terms["vat"]).config = cast(Term, one.terms["vat"]).config.model_copy(
        update={"eps": 1e-6}
    )
    state = torch.get_rng_state()
    assert value(one, given).item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_step_looks_from_elsewhere_and_a_repeated_one_from_the_same_place() -> None:
    one, given = carrier().train(), batch(recipe("supervised"))
    later = replace(given, now=Now(step=1))
    assert value(one, given) == value(one, given)
    assert value(one, given) != value(one, later)


def of_ranks(world: World) -> tuple[float, dict[str, Tensor]]:
    one = carrier(world).eval()
    result = value(one, share(batch(recipe("supervised")), world))
    result.backward()
    return result.item(), {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def test_value_and_gradient_are_those_of_the_global_batch() -> None:
    whole, slopes = of_ranks(World())
    for ranks in (2, 3):
        parts = on_ranks(ranks, of_ranks)
        assert sum(part[0] for part in parts) / ranks == pytest.approx(whole, rel=1e-3)
        for n, slope in slopes.items():
            mean = sum(part[1][n] for part in parts) / ranks
            torch.testing.assert_close(mean, slope, atol=2e-5, rtol=1e-3)


def test_a_uniform_answer_has_nothing_to_lose() -> None:
    wanted = torch.full((3, 4), -math.log(4))
    assert float(divergence(wanted, torch.zeros(3, 4))) == pytest.approx(0, abs=1e-6)
