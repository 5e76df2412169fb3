"""The one class that the rest of the house sees of a network: images in, features out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.models.sobel import Sobel


class Backbone(nn.Module):
    """A network without its classifier, behind the optional Sobel filters.

    `backbone(images)` are the features that are clustered and exported. A trained linear head gets
    `backbone.activation(features)`. DeepCluster clusters fc7 *before* its last ReLU and trains
    through the ReLU, so for alexnet_bn and vgg16_bn the activation is a ReLU. For all others, whose
    features are pooled already, it is the identity. A head on clustering centroids (`CentroidHead`)
    takes the features themselves.

    name: the name given to `build_backbone`. dim: width of a feature row. image_size: pixels it was
    built for. torchvision: the function in torchvision.models that loads `export_state()`
    (classifier aside), or None. meta: the header of an exported file, empty for other networks.
    preprocess: from an image to what the network was trained on, None for other networks.
    """

    def __init__(
        self, net: nn.Module, *, name: str, dim: int, image_size: int,
        sobel: bool = False, relu: bool = False, torchvision: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name = name
        self.dim = dim
        self.image_size = image_size
        self.torchvision = torchvision
        self.meta: dict[str, Any] = {}
        self.preprocess: Callable[[Any], Tensor] | None = None
        self.sobel = Sobel() if sobel else None
        self.net = net
        self.activation: nn.Module = nn.ReLU() if relu else nn.Identity()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b dim"]:
        """Features of normalised float images."""
        if self.sobel is not None:
            images = self.sobel(images)
        features: Tensor = self.net(images)
        return features

    def export_state(self) -> dict[str, Tensor]:
        """Return copies of the network's weights and statistics by its names: CPU, contiguous."""
        state = self.net.state_dict()
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
