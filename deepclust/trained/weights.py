"""The map from images to features of weights that are of no run: an export, or anybody's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from deepclust.errors import RecipeError
from deepclust.export.backbone import is_export
from deepclust.methods.base import Method
from deepclust.methods.embed import Embedder
from deepclust.models import BACKBONES, Backbone, build_backbone, start_weights
from deepclust.recipe.sections import Data
from deepclust.trained.saved import Alone, best_device, file_embedder

SIZE = 224  # pixels, of most released weights


@dataclass(frozen=True)
class Network:
    """What weights do not say themselves: the network that they are of, and its images."""

    backbone: str | None = None
    size: int | None = None
    sobel: bool = False


def weights_embedder(source: str, network: Network) -> tuple[Embedder, str]:
    """Return the map from images to features of weights, and what was taken of the source.

    `source` is an exported file, or what `start_weights.load_foreign` takes. Raises `RecipeError`
    where nothing says which network it is, or where the weights are not those of it.
    """
    if not start_weights.is_named(source) and is_export(source):
        if network != Network():
            raise RecipeError(
                f"{source} says which network it is of: leave --backbone, --size and --sobel out"
            )
        return file_embedder(Path(source)), f"{source}: an export of deepclust"
    name = network.backbone or _named(source)
    if name is None:
        raise RecipeError(
            f"{source} does not say which network its weights are of. Give --backbone NAME, such "
            "as resnet50 (deepclust list backbones), and --size of its images"
        )
    size = network.size or SIZE
    backbone = build_backbone(name, sobel=network.sobel, image_size=size)
    try:
        taken = start_weights.load_foreign(backbone, source)
    except RecipeError as error:  # its words are those of a recipe
        text = str(error).removeprefix("init.weights: ")
        for key, option in OPTIONS.items():
            text = text.replace(key, option)
        raise RecipeError(text) from error
    data = Data(shards="", size=size)
    own = start_weights.normalisation_of(source)
    if own is not None and len(own.mean) == 3:
        data = Data.model_validate({**data.model_dump(), **own._asdict()})
        taken += f"; images normalised as in their training, mean {[*own.mean]}, std {[*own.std]}"
    return _alone(backbone, data), taken


OPTIONS = {"backbone.name": "--backbone", "backbone.sobel": "--sobel", "data.size": "--size"}


def fresh_of(embedder: Embedder) -> Embedder:
    """Return the same map with random weights, which depend on the network alone."""
    old = embedder.method.trunk
    fresh = build_backbone(
        old.name, sobel=old.sobel is not None, image_size=old.image_size, import_module=False
    )
    return replace(_alone(fresh, embedder.data), precision=embedder.precision)


def _named(source: str) -> str | None:
    """Return the network that a library's name of weights says, None where it says none."""
    scheme, _, rest = source.partition(":")
    name = rest.partition("@")[0]
    if scheme == "torchvision" and name in BACKBONES:
        return name
    return f"timm/{name}" if scheme == "timm" else None


def _alone(backbone: Backbone, data: Data) -> Embedder:
    device = best_device()
    return Embedder(cast(Method, Alone.on(backbone, device)), data, "auto", device)
