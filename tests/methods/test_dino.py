"""DINO's loss and centre against lightly's, its schedules, and what keeps it from collapsing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightly.loss import DINOLoss
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Batch, Now
from deepclust.methods.dino.method import Method
from deepclust.methods.parts.centre import Centre
from deepclust.methods.parts.multi_crop import swapped
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe.sections import TrainSection
from deepclust.run.collapse import LINES, collapsed
from deepclust.stages.build import parameter_groups
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe
from tests.ranks import on_ranks

LOCAL = "data.local={count: 2, size: 8}"


def dino(*overrides: str) -> Method:
    torch.manual_seed(0)
    one = method(recipe("dino", *overrides))
    assert isinstance(one, Method)
    return one.train()


def given(*overrides: str) -> Batch:
    return batch(recipe("dino", *overrides))


def test_the_loss_and_the_centre_are_lightlys() -> None:
    torch.manual_seed(0)
    k, theirs = 12, DINOLoss(12, teacher_temp=0.05, warmup_teacher_temp_epochs=1)
    one = dino("method.prototypes=12", "method.teacher_temperature=0.05")
    for _ in range(4):
        taught, scores = 0.3 * torch.randn(2, 24, k), 0.3 * torch.randn(5, 24, k)
        expected = theirs(list(taught), list(scores))
        loss = swapped(one.sharpen(taught, Now()), scores / 0.1)
        one.centre.note(taught)
        one.centre.follow()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.centre.value, theirs.center.flatten(), atol=1e-7, rtol=0)


def test_the_whole_step_is_lightlys_on_the_same_networks() -> None:
    one, fixed = dino(LOCAL), given(LOCAL)
    taught = one.teacher.head(one.teacher.backbone(torch.cat(fixed.crops[:2])))
    rows = [one.backbone(torch.cat(fixed.crops[i : i + 2])) for i in (0, 2)]
    scores = one.head(torch.cat(rows))
    expected = DINOLoss(one.head.last.weight.shape[0])(list(taught.chunk(2)), list(scores.chunk(4)))
    torch.testing.assert_close(one(fixed)["loss"], expected, atol=1e-5, rtol=0)


def test_equal_networks_and_temperatures_cost_the_entropy_of_the_teacher() -> None:
    scores = torch.randn(1, 16, 8)
    targets = scores.softmax(2).expand(2, -1, -1)
    entropy = -(targets * targets.log()).sum(2).mean()
    torch.testing.assert_close(swapped(targets, scores.expand(4, -1, -1)), entropy)


def test_a_constant_output_pulls_the_centre_by_its_closed_form() -> None:
    centre = Centre(3, 0.9, ALONE)
    x = torch.tensor([1.0, -2.0, 3.0])
    for _ in range(10):
        centre.note(x.expand(2, 4, 3))
        centre.follow()
    torch.testing.assert_close(centre.value, (1 - 0.9**10) * x)


def of_parts(world: World) -> Tensor:
    """A step of two parts, the ranks with unequal numbers of rows."""
    centre = Centre(1, 0.0, world)
    rows = torch.arange(12.0)[:, None]
    own = rows[:2] if world.rank == 0 else rows[2:]
    for part in own.chunk(2) if world.size > 1 else rows.chunk(2):
        centre.note(part)
    centre.follow()
    return centre.value


def test_the_centre_is_that_of_all_ranks_and_parts() -> None:
    torch.testing.assert_close(on_ranks(2, of_parts), [of_parts(ALONE)] * 2)


def test_no_gradient_reaches_the_teacher_which_follows_by_its_momentum() -> None:
    one, fixed = dino("method.momentum=0.9"), given()
    assert one.trunk is one.teacher.backbone  # what is clustered, evaluated and exported
    one(fixed)["loss"].backward()
    assert all(p.grad is None for p in one.teacher.parameters())
    before = one.teacher.head.last.weight.clone()
    with torch.no_grad():
        one.head.last.weight.add_(1.0)
    one.after_step(Now(progress=0.5))  # momentum 0.95
    torch.testing.assert_close(one.teacher.head.last.weight, before + 0.05)


def test_schedules_are_functions_of_the_time() -> None:
    one = dino("method.teacher_warmup=4", "method.teacher_temperature=0.08", "method.freeze=0.5")
    times = [one.teacher_temperature(Now(epochs=e)) for e in (0, 2, 4, 9)]
    assert times == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert list(one.frozen(Now(epochs=0.4))) == ["head.last.weight"]
    assert list(one.frozen(Now(epochs=0.5))) == []
    free = dino("method.unit_last=false", "method.freeze=0.5")
    assert set(free.frozen(Now())) == {"head.last.weight", "head.last.scale"}


def test_the_last_layer_gives_cosines_whatever_the_length_of_its_rows() -> None:
    one = dino()
    features = torch.randn(5, one.backbone.dim)
    before = one.head(features)
    with torch.no_grad():
        one.head.last.weight.mul_(7)
    torch.testing.assert_close(one.head(features), before)
    assert before.abs().max() <= 1


@pytest.mark.parametrize(("dim", "hidden"), [(64, 32), (384, 2048)])
def test_a_bottleneck_of_any_width_has_a_size_that_can_be_divided_by(dim: int, hidden: int) -> None:
    one = dino(f"method.hidden={hidden}")
    assert 0.05 < float(one.head.layers(torch.randn(64, one.backbone.dim)).detach().std()) < 2


def test_a_last_layer_that_never_moves_is_refused() -> None:
    with pytest.raises(RecipeError, match="keep still in all 1 epochs"):
        recipe("dino", "method.freeze=1")


@pytest.mark.parametrize(("key", "words"), [
    ("method.centre_momentum=0.9", "None"),
    ("method.centre_momentum=1", "have one target"),
    ("method.teacher_temperature=0.1", "nearly uniform"),
], ids=["both", "without a centre", "without sharpening"])  # fmt: skip
def test_without_centre_or_sharpening_it_collapses_and_the_monitor_says_so(
    key: str, words: str
) -> None:
    """Noisy crops of 24 random images, 150 steps; the same for another seed and less noise."""
    of = ("data.local=null", "method.prototypes=32", "backbone.name=tests.toys.backbone", key)
    one, fixed = dino(*of), given(*of)
    config = TrainSection(epochs=1, lr=0.01, optimizer="adamw", weight_decay=0.0)
    optimizers = Optimizers(parameter_groups(one), config)
    for step in range(150):
        crops = tuple(fixed.crops[0] + 1.3 * torch.randn_like(fixed.crops[0]) for _ in range(2))
        told = one(replace(fixed, crops=crops, now=Now(step)))
        told["loss"].backward()
        optimizers.step()
        one.after_step(Now(step))
    line = {name: float(value.detach()) for name, value in told.items()}
    assert words in str(collapsed([line] * LINES))
