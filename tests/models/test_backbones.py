"""Backbones by name: widths, names of weights, seeds, sizes, and what is refused."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from deepclust.errors import RecipeError
from deepclust.models import BACKBONES, build_backbone, libraries

WIDTHS = {
    "alexnet_bn": 4096, "vgg16_bn": 4096, "conv4": 384, "resnet10_small": 512,
    "resnet50_small": 2048, "resnet18": 512, "resnet50": 2048, "wide_resnet50_2": 2048,
    "wrn16_1": 64, "wrn28_2": 128, "densenet121": 1024, "densenet161": 2208, "vit_b_16": 768,
    "vit_l_16": 1024,
}  # fmt: skip
CLASSIFIERS = ("fc.", "classifier.", "heads.")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_builds_for_two_channels_and_gives_one_row_an_image(name: str) -> None:
    with torch.device("meta"):
        rows = BACKBONES[name].build(2, 64)(torch.empty(2, 2, 64, 64))
    assert rows.shape == (2, WIDTHS.get(name, rows.shape[1]))


@pytest.mark.parametrize("name", [name for name in BACKBONES if BACKBONES[name].torchvision])
def test_weights_have_torchvisions_names_and_shapes_save_the_classifiers(name: str) -> None:
    with torch.device("meta"):
        ours = BACKBONES[name].build(3, 224).state_dict()
        theirs = get_model(BACKBONES[name].torchvision, weights=None).state_dict()
    assert {key: ours[key].shape for key in ours} == {key: theirs[key].shape for key in ours}
    left = theirs.keys() - ours.keys()
    assert len(left) == 2
    assert all(key.startswith(CLASSIFIERS) for key in left)


@pytest.mark.parametrize(
    "name", ["conv4", "resnet10_small", "wrn16_1", "resnet18", "densenet121", "vit_b_32"]
)
@pytest.mark.parametrize("sobel", [False, True])
def test_features_of_real_images_are_finite_and_as_wide_as_dim(name: str, sobel: bool) -> None:
    backbone = build_backbone(name, sobel=sobel, image_size=32)
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, backbone.dim)
    assert torch.isfinite(features).all()
    assert backbone.training


def test_alexnet_has_the_papers_weights_and_maps_at_224_pixels() -> None:
    shapes = [(96, 2, 11), (256, 96, 5), (384, 256, 3), (384, 384, 3), (256, 384, 3)]
    convs = sum(o * i * k * k + o + 2 * o for o, i, k in shapes)  # bias, then BatchNorm's two
    linears = (256 * 6 * 6 + 1) * 4096 + (4096 + 1) * 4096
    with torch.device("meta"):
        net = BACKBONES["alexnet_bn"].build(2, 224)
        maps = net.get_submodule("features")(torch.empty(1, 2, 224, 224))
    assert sum(weight.numel() for weight in net.parameters()) == convs + linears
    assert maps.shape == (1, 256, 6, 6)
    assert torch.equal(
        net.get_submodule("avgpool")(torch.ones(1, 256, 6, 6)), torch.ones(maps.shape)
    )


def test_a_wide_resnet_has_the_size_and_the_maps_of_the_paper() -> None:
    with torch.device("meta"):
        net = BACKBONES["wrn28_2"].build(3, 32)
        maps = net[:5](torch.empty(1, 3, 32, 32))
    assert maps.shape == (1, 128, 8, 8)
    convs = 3 * 16 * 9  # the stem
    norms = 2 * 128  # the last one
    for before, after, shortcut in ((16, 32, 16 * 32), (32, 64, 32 * 64), (64, 128, 64 * 128)):
        convs += shortcut + (before + 7 * after) * after * 9
        norms += 2 * (before + 7 * after)
    assert sum(weight.numel() for weight in net.parameters()) == convs + norms
    classifier = (128 + 1) * 10
    assert round((convs + norms + classifier) / 1e6, 2) == 1.47  # WRN-28-2


@pytest.mark.parametrize("size", [28, 32, 8])
def test_a_wide_resnet_takes_small_images_of_any_size(size: int) -> None:
    backbone = build_backbone("wrn16_1", image_size=size, seed=3)
    assert backbone(torch.randn(2, 3, size, size)).shape == (2, 64)
    slopes = {m.negative_slope for m in backbone.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.1}


def test_deepclusters_features_are_cut_before_the_relu_that_training_puts_back() -> None:
    backbone = build_backbone("alexnet_bn", image_size=63).eval()
    features = backbone(torch.randn(2, 3, 63, 63))
    assert (features < 0).any()
    assert torch.equal(backbone.activation(features), features.clamp(min=0))
    assert isinstance(build_backbone("resnet18", image_size=32).activation, nn.Identity)


def test_equal_seeds_give_equal_weights_and_leave_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (build_backbone("conv4", image_size=28, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [net.export_state()["blocks.0.0.weight"] for net in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("name", "smallest"), [("conv4", 8), ("alexnet_bn", 63)])
def test_a_small_image_is_refused_with_the_smallest_that_works(name: str, smallest: int) -> None:
    for size in (smallest // 2, smallest - 1):
        with pytest.raises(RecipeError, match=f"{name} .* {size} pixels; set data.size={smallest}"):
            build_backbone(name, image_size=size)
    assert build_backbone(name, image_size=smallest)(torch.randn(2, 3, smallest, smallest)).any()


def test_a_vit_names_the_sizes_that_its_patches_fill() -> None:
    with pytest.raises(RecipeError, match=r"patches of 16 pixels.*data.size=96 or 112"):
        build_backbone("vit_b_16", image_size=100)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_a_vit_of_timm_that_would_not_see_the_border_is_refused(name: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match=r"40 is not a multiple of it\. Set data\.size="):
        build_backbone(name, image_size=40)


@pytest.mark.parametrize(
    ("patch", "pads", "fits"),
    [(16, False, False), ((8, 20), False, True), (16, True, True), (None, False, True)],
)
def test_patches_fill_the_image_or_are_padded(patch: object, pads: bool, fits: bool) -> None:
    embed = SimpleNamespace(patch_size=patch, dynamic_img_pad=pads)
    net = SimpleNamespace(patch_embed=embed)
    with contextlib.nullcontext() if fits else pytest.raises(RecipeError, match="=32 or 48"):
        libraries._refuse_unseen_border(net, "x", 40)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18_smal", "timm/resnet18_smal"])
def test_an_unknown_name_suggests_the_nearest(name: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown backbone '{name}'. Did you mean 'resnet18_"):
        build_backbone(name)


def test_without_timm_its_names_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "has_timm", lambda: False)
    with pytest.raises(RecipeError, match=r"pip install 'deepclust\[timm\]'"):
        build_backbone("timm/resnet10t")


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timms_networks_build_by_either_name_at_any_size(name: str) -> None:
    pytest.importorskip("timm")
    bare, full = (build_backbone(n, image_size=48, sobel=True) for n in (name, f"timm/{name}"))
    assert bare.name == full.name == f"timm/{name}"
    assert bare.torchvision is None
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(bare.eval()(images), full.eval()(images))
    assert bare(images).shape == (2, bare.dim)


def test_timm_networks_that_do_not_fit_the_image_are_a_recipe_error() -> None:
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match="timm/levit_128s"):
        build_backbone("levit_128s", image_size=8)


@pytest.mark.parametrize("name", ["resnet10_small", "alexnet_bn"])
def test_channels_last_gives_the_same_features(name: str) -> None:
    backbone = build_backbone(name, sobel=True, image_size=63).eval()
    images = torch.randn(2, 3, 63, 63)
    plain = backbone(images)
    last = backbone.to(memory_format=torch.channels_last)
    assert torch.allclose(
        last(images.to(memory_format=torch.channels_last)), plain, rtol=1e-3, atol=1e-4
    )
