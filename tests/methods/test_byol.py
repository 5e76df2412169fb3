"""BYOL: its loss against lightly, and what it needs so as not to collapse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deepclust.methods.base import Batch, Now, Setting
from deepclust.methods.byol.config import Config
from deepclust.methods.byol.method import Method, distance
from deepclust.models.backbone import Backbone
from deepclust.run.collapse import LINES, collapsed
from deepclust.world import ALONE
from tests.methods.cases import batch, method, recipe


def test_the_distance_is_that_of_lightly_and_of_unit_rows() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 5, generator=random) for _ in range(2))
    ours = distance(a, b)
    torch.testing.assert_close(ours, 2 + 2 * NegativeCosineSimilarity()(a, b))
    torch.testing.assert_close(ours, (F.normalize(a) - F.normalize(b)).square().sum(1).mean())
    torch.testing.assert_close(ours, distance(3 * a, b / 7))
    torch.testing.assert_close(distance(a, -a), torch.tensor(4.0))


def test_either_crop_may_be_the_first() -> None:
    one, given = method(recipe("byol")).eval(), batch(recipe("byol"))
    swapped = replace(given, crops=given.crops[::-1])
    torch.testing.assert_close(one(given)["loss"], one(swapped)["loss"])


def test_no_gradient_reaches_the_teacher_and_it_follows() -> None:
    one = method(recipe("byol"))
    assert isinstance(one, Method)
    one(batch(recipe("byol")))["loss"].backward()
    assert all(parameter.grad is None for parameter in one.teacher.parameters())
    theirs = next(one.teacher.projection.parameters()).clone()
    with torch.no_grad():
        next(one.projection.parameters()).add_(1)
    one.after_step(Now(progress=1.0))
    assert torch.equal(next(one.teacher.projection.parameters()), theirs)
    one.after_step(Now(progress=0.0))
    expected = theirs + 0.004 * (next(one.projection.parameters()) - theirs)
    torch.testing.assert_close(next(one.teacher.projection.parameters()), expected)


class WithoutStop(Method):
    """The trained network teaches itself, with gradients."""

    def taught(self, crop: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.backbone(crop))
        return projected


def digits() -> Tensor:
    """scikit-learn's digits as images [n, 3, 8, 8]."""
    pixels = torch.from_numpy(load_digits().images).float() / 8 - 1
    return pixels[:, None].expand(-1, 3, -1, -1)


def spread_after(kind: type[Method], predictor: bool = True) -> float:
    """Train on digits in noise for 250 steps, and return the spread in the last one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU())
    config = Config(momentum=0.9, hidden=64, out=32)
    one = kind(Backbone(net, name="flat", dim=64, image_size=8), Setting(config, None, 0, ALONE))
    if not predictor:
        one.predictor = nn.Sequential()
    images, told = digits(), {}
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.3, 0.9)
    for step in range(250):
        some = images[torch.randint(len(images), (128,))]
        crops = tuple(some + torch.randn_like(some) for _ in range(2))
        none = torch.zeros(128, dtype=torch.long)
        told = one(Batch(none, crops, none, none[None, :0], none))
        optimizer.zero_grad()
        told["loss"].backward()
        optimizer.step()
        one.after_step(Now(step))
    return float(told["spread"])


@pytest.mark.parametrize(("kind", "predictor"), [(Method, False), (WithoutStop, True)])
def test_without_predictor_or_stop_gradient_it_collapses_and_the_monitor_says_so(
    kind: type[Method], predictor: bool
) -> None:
    lines = [{"spread": spread_after(kind, predictor)}] * LINES
    assert "the network has collapsed" in str(collapsed(lines))


def test_with_both_it_does_not() -> None:
    assert spread_after(Method) > 0.8
