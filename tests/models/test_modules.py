"""A backbone from a module of the user: `backbone.name=a.b.c`."""

from __future__ import annotations

import sys

import pytest
import torch

from deepclust.errors import RecipeError
from deepclust.models import build_backbone, check_sizes

TOY = "tests.toys.backbone"


def test_a_module_with_a_function_build_is_a_backbone() -> None:
    net = build_backbone(TOY, image_size=20, sobel=True)
    assert (net.name, net.dim) == (TOY, 16)
    assert net(torch.zeros(2, 3, 20, 20)).shape == (2, 16)


def test_its_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one, other = (build_backbone(TOY, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.no_such", r"tests.no_such' cannot be imported .*PYTHONPATH"),
        ("tests.tiny", r"tests.tiny has no function build.channels, image_size."),
    ],
)
def test_what_is_not_such_a_module_is_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_backbone(name)


def test_a_file_cannot_make_us_import_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, TOY, raising=False)
    with pytest.raises(RecipeError, match=f"import {TOY} first"):
        build_backbone(TOY, import_module=False)
    assert TOY not in sys.modules


def test_crops_that_are_too_small_for_the_backbone_are_refused() -> None:
    net = build_backbone("conv4", image_size=16)
    check_sizes(net, [16, 8])
    with pytest.raises(RecipeError, match=r"conv4, built for 16 pixels, cannot take crops of 4"):
        check_sizes(net, [16, 4])
