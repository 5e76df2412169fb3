"""Names to networks: the table of backbones, and the one function that builds them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from deepclust.errors import RecipeError
from deepclust.files import import_named
from deepclust.models import libraries
from deepclust.models.alexnet import alexnet_bn
from deepclust.models.backbone import Backbone
from deepclust.models.small import conv4, small_resnet
from deepclust.models.sobel import Sobel
from deepclust.models.wide_resnet import wide_resnet
from deepclust.world import derive

LARGEST_PROBE = 512  # pixels; no backbone here needs more


@dataclass(frozen=True)
class Builder:
    """How a named backbone is made."""

    build: Callable[[int, int], nn.Module]
    """(channels in, image size) to a network that gives features."""
    torchvision: str | None = None
    """The function in torchvision.models whose parameter names the network has."""
    relu: bool = False
    """Whether the features are cut before a ReLU, which training puts back."""
    build_many: Callable[[int, int], nn.Module] | None = None
    """Like `build`, for a network that else takes images of one size alone."""


def _torchvision(name: str, relu: bool = False) -> Builder:
    many = partial(libraries.torchvision_net, name, many_sizes=True)
    return Builder(
        partial(libraries.torchvision_net, name), name, relu,
        build_many=many if name.startswith("vit_") else None,
    )  # fmt: skip


BACKBONES: dict[str, Builder] = {
    # DeepCluster's two
    "alexnet_bn": Builder(alexnet_bn, relu=True),
    "vgg16_bn": _torchvision("vgg16_bn", relu=True),
    # small images
    "conv4": Builder(conv4),
    "resnet10_small": Builder(partial(small_resnet, BasicBlock, (1, 1, 1, 1))),
    "resnet18_small": Builder(partial(small_resnet, BasicBlock, (2, 2, 2, 2))),
    "resnet34_small": Builder(partial(small_resnet, BasicBlock, (3, 4, 6, 3))),
    "resnet50_small": Builder(partial(small_resnet, Bottleneck, (3, 4, 6, 3))),
    # small images, depth_width
    "wrn16_1": Builder(partial(wide_resnet, 16, 1)),
    "wrn16_2": Builder(partial(wide_resnet, 16, 2)),
    "wrn28_1": Builder(partial(wide_resnet, 28, 1)),
    "wrn28_2": Builder(partial(wide_resnet, 28, 2)),
    # torchvision's, under their own names
    "resnet18": _torchvision("resnet18"),
    "resnet34": _torchvision("resnet34"),
    "resnet50": _torchvision("resnet50"),
    "resnet101": _torchvision("resnet101"),
    "resnet152": _torchvision("resnet152"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "resnext101_32x8d": _torchvision("resnext101_32x8d"),
    "wide_resnet50_2": _torchvision("wide_resnet50_2"),
    "wide_resnet101_2": _torchvision("wide_resnet101_2"),
    "densenet121": _torchvision("densenet121"),
    "densenet161": _torchvision("densenet161"),
    "densenet169": _torchvision("densenet169"),
    "densenet201": _torchvision("densenet201"),
    "vit_b_16": _torchvision("vit_b_16"),
    "vit_b_32": _torchvision("vit_b_32"),
    "vit_l_16": _torchvision("vit_l_16"),
    "vit_l_32": _torchvision("vit_l_32"),
}


def build_backbone(
    name: str,
    *,
    sobel: bool = False,
    image_size: int = 224,
    seed: int = 0,
    sizes: Iterable[int] = (),
    import_module: bool = True,
) -> Backbone:
    """Return a backbone with random weights on the CPU, in training mode.

    name: a key of BACKBONES, else an architecture of timm, bare or as `timm/NAME`, else a module
    `a.b.c` with a function `build(channels, image_size)`. Without `import_module` it must be
    imported already, for names from files that may come from anywhere. sizes: other sizes of
    images, in pixels, that it shall take if it can (`check_sizes`). The weights depend on
    (name, sobel, image_size, seed) only. The caller's random state stays as it was. Raises
    RecipeError for an unknown name, a size that is too small, or channels that do not fit.
    """
    name, builder = _find(name, import_module)
    build = (set(sizes) - {image_size} and builder.build_many) or builder.build
    channels = Sobel.channels if sobel else 3
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, and fork_rng would have to restore them all
        torch.default_generator.manual_seed(derive(seed, "backbone"))
        net = build(channels, image_size)
    dim = _width(net, name, channels, image_size)
    return Backbone(
        net, name=name, dim=dim, image_size=image_size, sobel=sobel, relu=builder.relu,
        torchvision=None if sobel else builder.torchvision,
    )  # fmt: skip


def check_sizes(backbone: Backbone, sizes: Iterable[int]) -> None:
    """Raise RecipeError unless the backbone takes square crops of every size, in pixels."""
    channels = Sobel.channels if backbone.sobel is not None else 3
    patch = libraries.patch_of(backbone.net) or 1
    fix = f" that is a multiple of {patch}" if patch > 1 else ""
    for size in sorted(set(sizes) - {backbone.image_size}):
        if size % patch or not _fits(backbone.net, channels, size):
            raise RecipeError(
                f"backbone.name: {backbone.name}, built for {backbone.image_size} pixels, cannot "
                f"take crops of {size}: set another data.local.size{fix}, or choose another "
                "backbone, such as a resnet or a vit"
            )


def check_norms(backbone: Backbone, count: int, size: int) -> None:
    """Raise ValueError where batch norms cannot norm `count` square crops of a size, in training.

    Shapes only: nothing is computed, and no statistics are changed.
    """
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    images = torch.empty(count, 3, size, size, device="meta")
    with torch.no_grad():
        torch.func.functional_call(backbone, meta, (images,))


def _find(name: str, import_module: bool) -> tuple[str, Builder]:
    """Return the full name and its builder.

    The table comes first, then timm, then modules.
    """
    if name in BACKBONES:
        return name, BACKBONES[name]
    short = name.removeprefix("timm/")
    if libraries.is_timm(short):
        many = partial(libraries.timm_net, short, many_sizes=True)
        return f"timm/{short}", Builder(partial(libraries.timm_net, short), build_many=many)
    if "." in name and "/" not in name:
        return name, Builder(_module(name, import_module).build)
    raise RecipeError(_unknown(name, short))


def _module(name: str, import_it: bool) -> Any:
    """Return the module of that name, which has a function `build`."""
    module = import_named(name) if import_it else sys.modules.get(name)
    if module is None:
        raise RecipeError(f"import {name} first: a module is not imported because a file names it")
    if not callable(getattr(module, "build", None)):
        raise RecipeError(f"backbone.name: {name} has no function build(channels, image_size)")
    return module


def _unknown(name: str, short: str) -> str:
    known = [*BACKBONES, *libraries.timm_names()]
    near = difflib.get_close_matches(short, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    hint += "" if libraries.has_timm() else " For timm's networks: pip install 'deepclust[timm]'."
    return f"backbone.name: unknown backbone {name!r}.{hint} Included are {', '.join(BACKBONES)}."


def _width(net: nn.Module, name: str, channels: int, image_size: int) -> int:
    """Width of the features of an image of this size, which must be large enough."""
    try:
        shape = _features(net, channels, image_size).shape
    except (RuntimeError, ValueError, AssertionError) as error:
        smallest = _smallest(net, channels, image_size)
        fix = (
            f"set data.size={smallest} or more" if smallest else f"set another data.size ({error})"
        )
        raise RecipeError(
            f"backbone.name: {name} cannot take images of {image_size} pixels; {fix}, "
            f"or choose a backbone with a small stem such as resnet18_small."
        ) from error
    if len(shape) != 2:
        raise RecipeError(f"backbone.name: {name} gives {tuple(shape)}, not a row for each image.")
    return shape[1]


def _smallest(net: nn.Module, channels: int, image_size: int) -> int | None:
    """Return the smallest image that fits, by bisection between what fails and what fits."""
    low, high = image_size, LARGEST_PROBE
    if not _fits(net, channels, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(net, channels, middle) else (middle, high)
    return high


def _fits(net: nn.Module, channels: int, image_size: int) -> bool:
    try:
        _features(net, channels, image_size)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def _features(net: nn.Module, channels: int, image_size: int) -> Tensor:
    """Pass one image through the network, shapes only: nothing is computed."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    image = torch.empty(1, channels, image_size, image_size, device="meta")
    net.eval()
    try:
        with torch.no_grad():
            features: Tensor = torch.func.functional_call(net, meta, (image,))
    finally:
        net.train()
    return features
