"""The locality of class activation maps: against brute force, and where the maps come from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Now
from deepclust.methods.terms.locality.term import half_plane_norms
from deepclust.models import build_backbone
from deepclust.models.last_map import LastMap, find_last_map
from tests.methods.cases import TOY, batch, method, recipe

N = 7
TERM = "terms.locality.weight=0.5"


def cost(one: Tensor) -> float:
    return float(half_plane_norms(one[None].double()))


def brute_force(one: Tensor) -> float:
    """The norm of every half-plane, one after the other."""
    h, w = one.shape
    groups = [one[:, : k + 1] for k in range(w)] + [one[:, k:] for k in range(w)]
    groups += [one[: k + 1] for k in range(h)] + [one[k:] for k in range(h)]
    return sum(float(group.detach().double().norm()) for group in groups)


@pytest.mark.parametrize("shape", [(N, N), (3, 5), (1, 4), (1, 1)])
def test_it_is_the_sum_over_all_half_planes(shape: tuple[int, int]) -> None:
    maps = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([brute_force(one) for one in maps])
    torch.testing.assert_close(half_plane_norms(maps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [(0, 0), (3, 3), (6, 2)])
def test_one_point_costs_the_same_anywhere(place: tuple[int, int]) -> None:
    one = torch.zeros(N, N)
    one[place] = -2
    assert cost(one) == pytest.approx(2 * (N + 1) * 2, abs=1e-4)


def test_a_constant_map_costs_what_its_half_planes_cost() -> None:
    expected = 4 * 2 * math.sqrt(N) * sum(math.sqrt(k) for k in range(1, N + 1))
    assert cost(torch.full((N, N), 2.0)) == pytest.approx(expected)


def test_flips_and_a_transpose_change_nothing() -> None:
    one = torch.randn(N, N)
    for other in (one.flip(0), one.flip(1), one.T):
        assert cost(other) == pytest.approx(cost(one))


def test_two_points_cost_more_the_further_they_are_apart() -> None:
    def apart(columns: int) -> float:
        one = torch.zeros(N, N)
        one[2, 0] = one[2, columns] = 3
        return cost(one)

    for d in range(2, N):
        assert apart(d) - apart(1) == pytest.approx((d - 1) * (2 - math.sqrt(2)) * 3, abs=1e-4)


def test_zeros_have_a_finite_gradient() -> None:
    maps = torch.zeros(2, N, N, requires_grad=True)
    half_plane_norms(maps).sum().backward()
    assert torch.isfinite(maps.grad).all()


NETS = [("resnet18", True), ("densenet121", True), ("wrn16_1", True), ("resnet10_small", True),
        ("conv4", False)]  # fmt: skip


@pytest.mark.parametrize(("name", "plain"), NETS)
def test_the_mean_of_the_last_map_is_the_features(name: str, plain: bool) -> None:
    backbone = build_backbone(name, image_size=64).train()
    before = backbone.export_state()
    last = LastMap(backbone)
    assert all(torch.equal(before[key], value) for key, value in backbone.export_state().items())
    assert last.is_plain == plain
    last.keep_next()
    features = backbone(torch.randn(6, 3, 64, 64))
    backbone(torch.randn(2, 3, 64, 64))  # a later pass of the same step
    maps = last.take(features)
    assert maps.shape[:2] == features.shape
    assert maps.shape[2] > 1
    torch.testing.assert_close(maps.mean((2, 3)), features, rtol=1e-3, atol=1e-4)
    assert maps.requires_grad


def test_a_map_is_kept_only_when_asked_for_and_a_copy_keeps_its_own() -> None:
    backbone = build_backbone("conv4", image_size=16)
    last, images = LastMap(backbone), torch.randn(2, 3, 16, 16)
    backbone(images)
    other = copy.deepcopy(backbone)
    last.keep_next()
    other(images)
    with pytest.raises(AssertionError, match="no pass was kept"):
        last.take(torch.zeros(2, 384))


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 32), ("alexnet_bn", 63)])
def test_a_backbone_that_pools_no_map_is_refused(name: str, size: int) -> None:
    backbone = build_backbone(name, image_size=size)
    with pytest.raises(ValueError, match=f"{name}"):
        find_last_map(backbone)
    assert backbone.training


def test_a_backbone_without_a_map_is_refused_with_the_key() -> None:
    with pytest.raises(RecipeError, match=r"terms\.locality: .*vit_b_16"):
        method(recipe("deepcluster", TERM, "backbone.name=vit_b_16"))


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("swav", "train.epochs=2"),
        ("dino", "train.epochs=2"),
        ("deepcluster", "method.head=centroids"),
    ],
)
def test_a_method_without_a_linear_classifier_is_refused(name: str, override: str) -> None:
    with pytest.raises(RecipeError, match=r"terms\.locality: .*not those of a linear layer"):
        method(recipe(name, TERM, override))


@pytest.mark.parametrize("name", ["deepcluster", "deepercluster", TOY])
def test_the_term_is_the_cost_of_the_predicted_classes_map(name: str) -> None:
    of = recipe(name, TERM, "backbone.name=resnet10_small", "data.size=32", "data.resize=32")
    one, given = method(of).eval(), batch(of)
    told = one(given)["term_locality"]
    linear = one.get_submodule(one.terms["locality"].classifier)
    maps: list[Tensor] = []
    handle = one.backbone.net.layer4.register_forward_hook(lambda *args: maps.append(args[2]))
    features = one.backbone(given.crops[0])
    handle.remove()
    top = linear(features).argmax(1)
    expected = 0.0
    for each, label in zip(maps[0], top, strict=True):
        cam = (each * linear.weight[label][:, None, None]).sum(0)
        expected += brute_force(cam / cam.norm()) / (sum(cam.shape) + 2) - 1
    assert float(told) == pytest.approx(expected / len(top), abs=1e-4)
    assert 0 < float(told) < math.sqrt(2) - 1


def test_it_teaches_the_backbone_and_the_classifier_and_is_lowered_by_training() -> None:
    of = recipe("deepcluster", "terms.locality.weight=100")
    one, given = method(of).train(), batch(of)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
    values = []
    for _ in range(5):
        told = one(given)
        told["loss"].backward()
        assert one.head.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(told["term_locality"]))
    assert values[-1] < values[0]


@pytest.mark.parametrize("backbone", ["conv4", "resnet10_small"])
def test_mixed_precision_changes_it_by_rounding_alone(backbone: str) -> None:
    of = recipe("deepcluster", TERM, f"backbone.name={backbone}", "data.size=32", "data.resize=32")
    one, given = method(of).train(), batch(of)
    full = one(given)["term_locality"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = one(given)["term_locality"]
    assert mixed.dtype == torch.float32
    assert abs(float(mixed - full)) < 0.02


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_it_compiles_once() -> None:
    of, graphs = recipe("deepcluster", TERM), []
    one, given = method(of).train(), batch(of)

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    plain = one(given)["term_locality"]
    torch._dynamo.reset()
    compiled = torch.compile(one, backend=count)
    values = [compiled(given)["term_locality"] for _ in range(3)]
    assert Now() == given.now
    assert len(graphs) <= 4
    torch.testing.assert_close(values[0], plain)
