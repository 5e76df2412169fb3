"""Which layers of a network are probed, and their outputs as rows of about 9,000 numbers.

AlexNet and VGG have conv1 to conv5 as in DeepCluster (Caron et al. 2018, section 4.2): after the
ReLU, for VGG of the last convolution before each pooling. Maps are averaged to about 9,000 numbers,
10 x 10 places of 96 channels or 6 x 6 of 256. So did Zhang et al., "Colorful image colorization",
2016. Other networks are probed by block. ViTs give the class tokens of their last four blocks after
the last norm, as in DINO (Caron et al. 2021), or the mean token where there is no class token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from deepclust.errors import RecipeError
from deepclust.evaluate.frozen import Embed
from deepclust.models import Backbone

NUMBERS = 9_000
LAST_BLOCKS = 4
CONVOLUTIONS = 5
OUTPUTS = (nn.ReLU, nn.Sequential)  # a Sequential is a whole convolution of our conv4
PLAIN = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, *OUTPUTS)


def layers_of(backbone: Backbone, embed: Embed) -> Iterator[tuple[str, Embed]]:
    """Yield the name of each layer, and the map from images to its rows.

    `embed` runs the backbone on images, however it does. Raises `RecipeError` for a network whose
    layers are not known.
    """
    modules, row = _modules(backbone.net)
    for name, module in modules.items():
        yield name, _tapped(module, embed, row)


def pooled(output: Float[Tensor, "b c h w"]) -> Float32[Tensor, "b d"]:
    """Return maps as rows, averaged to places that give about NUMBERS, or fewer where they have."""
    side = max(1, round((NUMBERS / output.shape[1]) ** 0.5))
    places = (min(side, output.shape[2]), min(side, output.shape[3]))
    return nn.functional.adaptive_avg_pool2d(output.float(), places).flatten(1)


def _tapped(module: nn.Module, embed: Embed, row: Callable[[Tensor], Tensor]) -> Embed:
    """Return the map from images to rows of what a module gives."""

    def rows(images: UInt8[Tensor, "b 3 s s"]) -> Float32[Tensor, "b d"]:
        kept: list[Tensor] = []  # made rows at once: a later layer may write in place
        handle = module.register_forward_hook(lambda _, given, output: kept.append(row(output)))
        try:
            embed(images)
        finally:
            handle.remove()
        return kept[-1]

    return rows


def _modules(net: nn.Module) -> tuple[dict[str, nn.Module], Callable[[Tensor], Tensor]]:
    """Return the layers of a network by name, and how an output becomes rows."""
    blocks = _blocks(net)
    if blocks is not None:
        first = len(blocks) - min(LAST_BLOCKS, len(blocks))
        named = {f"block{i + 1}": block for i, block in enumerate(blocks) if i >= first}
        return named, _token_of(net)
    features = getattr(net, "features", getattr(net, "blocks", None))  # blocks: our conv4
    if isinstance(features, nn.Sequential) and all(isinstance(m, PLAIN) for m in features):
        return {f"conv{i}": one for i, one in enumerate(_convolutions(features), 1)}, pooled
    named = {
        name: child for name, child in net.named_children()
        if name.rstrip("0123456789") in ("layer", "stage") and name[-1].isdigit()
    }  # fmt: skip
    if not named:
        raise RecipeError(
            f"--layers: the layers of a {type(net).__name__} are not known. They are of AlexNet, "
            "VGG, ResNets and ViTs. Take `deepclust embed --layer NAME` for one of this network"
        )
    return named, pooled


def _blocks(net: nn.Module) -> list[nn.Module] | None:
    """Return the blocks of a ViT of timm or torchvision, None for other networks."""
    encoder = getattr(net, "encoder", None)
    if encoder is not None and hasattr(encoder, "layers"):
        return list(encoder.layers)
    return list(net.blocks) if hasattr(net, "blocks") and hasattr(net, "patch_embed") else None  # type: ignore[arg-type]


def _convolutions(features: nn.Sequential) -> list[nn.Module]:
    """Return at most five outputs: all, or the last before each pooling where there are more."""
    relus: list[nn.Module] = [one for one in features if isinstance(one, OUTPUTS)]
    if len(relus) <= CONVOLUTIONS:
        return relus
    steps = pairwise(features)
    return [a for a, b in steps if isinstance(a, nn.ReLU) and isinstance(b, nn.MaxPool2d)]


def _token_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what makes rows of tokens [b, t, c]: normed, and the class token, or else the mean."""
    encoder = getattr(net, "encoder", net)
    norm: nn.Module = getattr(encoder, "ln", getattr(encoder, "norm", nn.Identity()))
    has_class = getattr(net, "class_token", getattr(net, "cls_token", None)) is not None

    def token(output: Tensor) -> Tensor:
        normed = norm(output).float()
        return normed[:, 0] if has_class else torch.mean(normed, 1)

    return token
