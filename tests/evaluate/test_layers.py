"""The layers that are probed: which ones, their widths, and that nothing of the network changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepclust.errors import RecipeError
from deepclust.evaluate.layers import layers_of, pooled
from deepclust.models import Backbone, build_backbone

WIDTHS = {
    "alexnet_bn": (64, {"conv1": 96 * 100, "conv2": 256 * 36, "conv3": 384 * 9, "conv4": 384 * 9}),
    "vgg16_bn": (32, {"conv1": 64 * 144, "conv2": 128 * 64, "conv3": 256 * 36, "conv5": 512 * 4}),
    "resnet10_small": (16, {"layer1": 64 * 144, "layer2": 128 * 64, "layer4": 512 * 4}),
    "wrn16_1": (16, {"stage1": 16 * 256, "stage3": 64 * 16}),
    "conv4": (16, {"conv1": 16 * 256, "conv4": 384 * 4}),
    "vit_b_32": (32, {"block9": 768, "block12": 768}),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_every_layer_gives_rows_of_about_nine_thousand_numbers(name: str) -> None:
    size, widths = WIDTHS[name]
    backbone = build_backbone(name, image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        before = backbone(images)
        rows = {layer: embed(images) for layer, embed in layers_of(backbone, backbone)}
        assert torch.equal(backbone(images), before)
    got = {layer: one.shape[1] for layer, one in rows.items()}
    assert widths.items() <= got.items()
    assert {"alexnet_bn": 5, "vgg16_bn": 5, "wrn16_1": 3}.get(name, 4) == len(rows)


def test_the_last_class_token_of_a_vit_is_its_feature() -> None:
    backbone = build_backbone("vit_b_32", image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        rows = dict(layers_of(backbone, backbone))["block12"](images)
        torch.testing.assert_close(rows, backbone(images))


def test_maps_are_averaged_to_the_places_of_the_papers() -> None:
    for channels, side in ((96, 10), (256, 6), (384, 5)):
        assert pooled(torch.ones(1, channels, 27, 27)).shape[1] == channels * side * side


def test_a_network_of_unknown_layers_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    backbone = Backbone(Net(), name="net", dim=12, image_size=2)
    dense = build_backbone("densenet121", image_size=64)
    with pytest.raises(RecipeError, match="layers of a DenseNet are not known"):
        list(layers_of(dense, dense))
    with pytest.raises(RecipeError, match="layers of a Net are not known"):
        list(layers_of(backbone, backbone))
