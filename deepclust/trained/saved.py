"""The network of a saved run, or of an exported file, as the map from images to features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.errors import DataError, RecipeError
from deepclust.export.backbone import load_backbone
from deepclust.methods.base import Method
from deepclust.methods.embed import Embedder
from deepclust.models import Backbone
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data
from deepclust.run import final_round
from deepclust.run.checkpoint import (
    Checkpoint,
    counting_weights,
    load,
    load_latest,
    put_weights,
    read_state,
)
from deepclust.run.directory import Run
from deepclust.run.labels import class_names
from deepclust.stages.build import build_method
from deepclust.world import World

Tell = Callable[[str], None]


class Alone(nn.Module):
    """A backbone in the place of a method: what it embeds are its features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.trunk = backbone

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Return the features of the backbone."""
        features: Tensor = self.trunk(images)
        return features

    @classmethod
    def on(cls, backbone: Backbone, device: torch.device) -> Self:
        """Return it on a device, in evaluation mode and in the memory layout of extraction."""
        return cls(backbone).to(device).eval().to(memory_format=torch.channels_last)


def best_device() -> torch.device:
    """Return a GPU, if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fresh_embedder(recipe: Recipe, classes: tuple[str, ...] = ()) -> Embedder:
    """Return the map from images to features of a recipe's random initial weights."""
    device = best_device()
    method = build_method(recipe, World(device=device), new=False, classes=classes)
    method = method.to(device).eval()
    method = method.to(memory_format=torch.channels_last)
    return Embedder(method, recipe.data, recipe.train.precision, device)


def embedder_of(run: Run, saved: Checkpoint) -> Embedder:
    """Return the embedder of a run's saved weights.

    What ranks own slices of (`Method.owned`) is not among the weights: those are heads, which
    embedding does not use.
    """
    embedder = fresh_embedder(run.recipe, class_names(run))
    weights = counting_weights(run, saved)
    put_weights(embedder.method, weights, "the checkpoint", embedder.method.owned())
    return embedder


def file_embedder(path: Path) -> Embedder:
    """Return the map from images to features of an exported file, which says how they are read.

    Raises `DataError` for a file that `load_backbone` cannot read.
    """
    backbone, device = load_backbone(path), best_device()
    facts = {key: backbone.meta[key] for key in ("mean", "std", "resize") if key in backbone.meta}
    try:
        data = Data(shards="", size=backbone.image_size, **facts)
    except ValueError as error:  # anybody may have written the header
        raise DataError(f"{path}: its header describes no images: {error}") from error
    return Embedder(cast(Method, Alone.on(backbone, device)), data, "auto", device)


def newest(run: Run, tell: Tell) -> Checkpoint:
    """Return the newest checkpoint that can be read, and tell of each that cannot."""
    saved = load_latest(run, lambda text: tell(f"warning: {text}"))
    if saved is None:
        raise DataError(
            f"{run.path} has no checkpoint that can be read. Continue it: "
            f"deepclust resume {run.path}"
        )
    return saved


def checkpoint_of_round(run: Run, number: int, tell: Tell) -> Checkpoint:
    """Return the weights that a round's features were made with, or else the newest.

    Those of a final round are the exported ones. Those of another round are in the checkpoint that
    was saved just before it, if that is still there. `tell` is given a sentence where clusters and
    weights do not belong together.
    """
    if final_round.is_final(run, number):
        saved = newest(run, tell)
        if saved.state.step == final_round.step_of(run, number):
            return saved
    elif not run.recipe.clustering.overlap:
        before = [folder for folder in run.checkpoints() if read_state(folder).round < number]
        if before:
            return Checkpoint(before[-1], *load(before[-1], alive=run.alive))
        saved = newest(run, tell)
    else:
        saved = newest(run, tell)
    tell(
        f"warning: the clusters are of round {number}, and the weights of step {saved.state.step} "
        "are newer. Some images are nearer to another cluster than they were"
    )
    return saved


def layer_of(embedder: Embedder, name: str | None) -> Callable[[Tensor], Tensor]:
    """Return what embeds images: the features, or the mean output of a layer of the backbone.

    Outputs [b, c, h, w] and [b, t, c] are averaged over places. Raises `RecipeError` with the names
    for a layer that is not there.
    """
    if name is None:
        return embedder
    net = embedder.method.trunk.net
    layers = dict(net.named_modules())
    if name not in layers or not name:
        shown = ", ".join(n for n, _ in net.named_children()) or "none"
        raise RecipeError(f"--layer {name}: the backbone has {shown}, and what is in these (a.b)")
    kept: list[Tensor] = []

    def embed(images: Tensor) -> Tensor:
        handle = layers[name].register_forward_hook(
            lambda module, given, output: kept.append(output)
        )
        try:
            embedder(images)
        finally:
            handle.remove()
        output = kept[-1] if kept else None
        kept.clear()
        return _row_of(output, name)

    return embed


def _row_of(output: object, name: str) -> Float[Tensor, "b c"]:
    """Return the rows of a layer's output, its mean over places."""
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4:
        raise RecipeError(f"--layer {name}: its output cannot be made a row of each image")
    if output.ndim == 4:
        output = output.mean((2, 3))
    return (output.mean(1) if output.ndim == 3 else output).float()
