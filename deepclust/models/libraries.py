"""Networks of torchvision and timm with their classifier taken off, and 2 channels in if asked."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torchvision
from torch import nn

from deepclust.errors import RecipeError
from deepclust.models.positions import ManySizes


def torchvision_net(
    name: str, in_channels: int, image_size: int, *, many_sizes: bool = False
) -> nn.Module:
    """Build the torchvision network `name`, random weights, features instead of logits.

    Every parameter keeps torchvision's name, so the weights load back into
    `torchvision.models.NAME()`. With `many_sizes` a ViT takes other sizes too. Raises RecipeError
    when a ViT's patches do not fill the image.
    """
    net = headless(torchvision_plain(name, image_size))
    if many_sizes and isinstance(net, torchvision.models.VisionTransformer):
        net.__class__ = ManySizes  # the same parameters, another forward pass
    if in_channels != 3:
        _narrow_first_conv(net, in_channels)
    return net


def torchvision_plain(name: str, image_size: int) -> nn.Module:
    """Build the torchvision network `name` with classifier (a ViT for `image_size`)."""
    net: nn.Module
    if not name.startswith("vit_"):
        net = torchvision.models.get_model(name, weights=None)
        return net
    patch = int(name.rsplit("_", 1)[1])
    if image_size % patch or image_size < patch:
        below = max(patch, image_size // patch * patch)
        raise RecipeError(
            f"backbone.name: {name} cuts images into patches of {patch} pixels, and "
            f"{image_size} is not a multiple of it. Set data.size={below} or {below + patch}."
        )
    net = torchvision.models.get_model(name, weights=None, image_size=image_size)
    return net


def headless(net: nn.Module) -> nn.Module:
    """Take the classifier off a torchvision network, in place.

    What remains gives features.

    A VGG is cut before the ReLU of fc7, as in DeepCluster's `models/vgg16.py`, which has the same
    layers and initialisation. The others are cut after their global pooling or class token.
    """
    if isinstance(net, torchvision.models.VGG):
        net.classifier = net.classifier[:4]
    elif isinstance(net, torchvision.models.DenseNet):
        net.classifier = nn.Identity()
    elif isinstance(net, torchvision.models.VisionTransformer):
        net.heads = nn.Identity()
    else:
        net.fc = nn.Identity()
    return net


def _narrow_first_conv(net: nn.Module, in_channels: int) -> None:
    """Keep the first channels of the first convolution's random filters.

    Filters are drawn independently for every channel, so a slice is a fair draw too. A scale that
    depends on the number of channels is off by sqrt(3/2), which the norm evens out.
    """
    conv = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    conv.weight = nn.Parameter(conv.weight.detach()[:, :in_channels].clone())
    conv.in_channels = in_channels


def has_timm() -> bool:
    """Return whether the optional package timm is installed."""
    return importlib.util.find_spec("timm") is not None


def is_timm(name: str) -> bool:
    """Return whether timm is installed and knows this architecture."""
    return name in timm_names()


def timm_names() -> list[str]:
    """Return every architecture that the installed timm can build, or none without timm."""
    if not has_timm():
        return []
    import timm

    return list(timm.list_models())


def timm_net(
    name: str, in_channels: int, image_size: int, *, many_sizes: bool = False
) -> nn.Module:
    """Build the timm network `name`, random weights, no classifier (num_classes=0).

    With `many_sizes` it takes other sizes too, if timm can interpolate its positions. Raises
    RecipeError when it cannot be built for these channels or this image size.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"in_chans": in_channels, "num_classes": 0}
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if many_sizes and _knows(name, "dynamic_img_size"):
        options["dynamic_img_size"] = True
    try:
        net: nn.Module = timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"backbone.name: timm/{name} cannot be built for {in_channels} input channels and "
            f"images of {image_size} pixels ({error}). Change data.size, turn backbone.sobel off, "
            f"or choose another backbone."
        ) from error
    _refuse_unseen_border(net, name, image_size)
    return net


def _knows(name: str, option: str) -> bool:
    """Return whether a timm network has an option, by building it without memory."""
    import timm

    options: dict[str, Any] = {option: True}
    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, **options)
    except TypeError:
        return False
    return True


def patch_of(net: nn.Module) -> int | None:
    """Return the side of the patches that a network cuts images into, or None without any."""
    if isinstance(net, torchvision.models.VisionTransformer):
        return int(net.patch_size)
    embed = getattr(net, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None or getattr(embed, "dynamic_img_pad", False):
        return None
    return max(size) if isinstance(size, tuple | list) else int(size)


def _refuse_unseen_border(net: nn.Module, name: str, image_size: int) -> None:
    """Raise RecipeError where patches do not fill the image: the last pixels would not be seen."""
    patch = patch_of(net)
    if patch is not None and image_size % patch:
        below = max(patch, image_size // patch * patch)
        raise RecipeError(
            f"backbone.name: timm/{name} cuts images into patches of {patch} pixels, and "
            f"{image_size} is not a multiple of it. Set data.size={below} or {below + patch}."
        )
