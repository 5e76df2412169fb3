"""Backbones that take crops of two sizes, and those that say they cannot."""

from __future__ import annotations

import pytest
import torch

from deepclust.errors import RecipeError
from deepclust.models import build_backbone, check_sizes
from deepclust.models.positions import positions_of

VITS = ["vit_b_32", "timm/vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", VITS)
def test_a_vit_of_many_sizes_is_the_same_network_at_its_own(name: str) -> None:
    one = build_backbone(name, image_size=64).eval()
    many = build_backbone(name, image_size=64, sizes=[64, 32]).eval()
    check_sizes(many, [64, 32])
    assert one.export_state().keys() == many.export_state().keys()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(one(images), many(images))
        assert many(images[..., :32, :32]).shape == (2, many.dim)


@pytest.mark.parametrize("name", VITS)
def test_crops_that_its_patches_do_not_fill_are_refused(name: str) -> None:
    many = build_backbone(name, image_size=64, sizes=[40])
    with pytest.raises(RecipeError, match=r"cannot take crops of 40: .* that is a multiple of"):
        check_sizes(many, [64, 40])


def test_a_backbone_of_one_size_says_so() -> None:
    one = build_backbone("timm/mixer_s32_224", image_size=224, sizes=[96])
    with pytest.raises(RecipeError, match=r"built for 224 pixels, cannot take crops of 96"):
        check_sizes(one, [224, 96])


def test_positions_are_interpolated_as_timm_does() -> None:
    layers = pytest.importorskip("timm.layers")
    learned = torch.randn(1, 1 + 16, 6, requires_grad=True)
    ours = positions_of(learned, 3, 2)
    theirs = layers.resample_abs_pos_embed(learned, new_size=[3, 2], num_prefix_tokens=1)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert learned.grad is not None
