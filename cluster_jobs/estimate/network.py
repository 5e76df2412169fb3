"""The size of a recipe's networks: parameters, and what one image takes, from a pass on the CPU.

The method is built without memory for its numbers, on torch's device `meta`. So heads, teachers
and queues of any size are counted and not made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepclust.methods.base import Method
from deepclust.models import build_backbone
from deepclust.recipe import Recipe
from deepclust.recipe.declare import Pass
from deepclust.stages.build import build_method
from deepclust.world import World


@dataclass(frozen=True)
class Network:
    """A method's networks: parameters, feature width, and for an image of a step what it takes."""

    parameters: int  # of the backbone
    trained: int  # of everything that has gradients
    owned: int  # those of them of which every rank has a part
    saved: int  # bytes of the method in a checkpoint, without what it has for each sample
    exported: int  # bytes of the backbone's weights
    width: int
    row: int  # numbers of a row as a round extracts it; 0 without rounds
    step_flops: float  # of all crops, forward and backward
    extract_flops: float  # of one image forward, at data.size
    outputs: float  # numbers that all layers write for one image forward, at data.size
    largest: float  # numbers of the largest of them
    activations: float  # the same for an image's trained crops, kept for the backward


def measure(recipe: Recipe, classes: int = 0) -> Network:
    """Return the size of the recipe's networks, and what its method sends through the backbone.

    `classes` are those of the seeds, for heads that have one answer for each.
    """
    sizes = [kind.size for kind in recipe.method.crops(recipe.data)]
    name, sobel = recipe.backbone.name, recipe.backbone.sobel
    backbone = build_backbone(name, sobel=sobel, image_size=recipe.data.size, seed=0, sizes=sizes)
    backbone.eval()  # batch norm of one image
    passes = recipe.cost(backbone.dim).passes
    known = {size: _pass(backbone, size) for size in {recipe.data.size, *(p.size for p in passes)}}
    return Network(
        **_built(recipe, backbone.dim, classes),
        parameters=sum(one.numel() for one in backbone.parameters()),
        exported=sum(one.nbytes for one in backbone.state_dict().values()),
        width=backbone.dim,
        step_flops=sum(_flops(one) * known[one.size][0] for one in passes),
        extract_flops=known[recipe.data.size][0],
        outputs=known[recipe.data.size][1],
        largest=known[recipe.data.size][2],
        activations=sum(one.count * known[one.size][1] for one in passes if one.trained),
    )


def _built(recipe: Recipe, width: int, classes: int) -> dict[str, int]:
    """Return what the method trains, saves and extracts; of unknown classes of seeds, for two."""
    known = max(2, classes) if recipe.seeds is not None else 0
    names = tuple(str(number) for number in range(known))
    with torch.device("meta"):
        method = build_method(recipe, World(), new=False, classes=names)
    trained = {name: one.numel() for name, one in method.named_parameters() if one.requires_grad}
    return {
        "trained": sum(trained.values()),
        "owned": sum(trained.get(name, 0) for name in method.owned()),
        "saved": sum(one.nbytes for one in method.state_dict().values()),
        "row": 0 if recipe.method.round is None else _row(method, width),
    }


def _row(method: Method, width: int) -> int:
    """Return the width of what the method clusters: the features', or that of a projection."""
    method.embed = lambda images: images  # type: ignore[method-assign]  # features are given
    with torch.device("meta"), torch.no_grad():  # seeded weights are on the CPU until now
        return int(method.eval().to("meta").clustered(torch.zeros(1, width)).shape[1])


def _flops(one: Pass) -> int:
    """Return forward passes of a step: a backward costs two."""
    return one.count * (3 if one.trained else 1)


def _pass(backbone: nn.Module, size: int) -> tuple[float, float, float]:
    """Return the operations of an image forward, and the numbers of all outputs and the largest."""
    kept: list[int] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not list(module.children()):
            kept.append(output.numel())

    hooks = [module.register_forward_hook(keep) for module in backbone.modules()]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return float(counter.get_total_flops()), float(sum(kept)), float(max(kept, default=0))
