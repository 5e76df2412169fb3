"""From the recipe to the parts that a rank works with: method, optimizers, loader, saved state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.parallel import DistributedDataParallel

from deepclust.data.read.loader import Loader
from deepclust.data.read.mirror import mirror_shards
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError
from deepclust.methods import METHODS
from deepclust.methods.base import Method, Setting, Targets
from deepclust.methods.embed import Embedder
from deepclust.models import build_backbone
from deepclust.optim.optimizers import Group, Optimizers
from deepclust.recipe import Recipe
from deepclust.recipe.sections import parse_cadence
from deepclust.run import checkpoint
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run
from deepclust.run.events import EventName
from deepclust.run.reporting import Metrics, Report
from deepclust.stages import cluster, warm_start
from deepclust.stages.batches import Feed
from deepclust.stages.schedule import Timeline
from deepclust.stages.train import Trainer
from deepclust.stages.train_state import put_back, saver
from deepclust.world import World

Ignore: TypeAlias = Callable[[torch.nn.Module, list[str]], None]


@dataclass(frozen=True)
class Context:
    """What the chain runs with: the recipe, the run, this rank's world, and its ways out."""

    recipe: Recipe
    run: Run
    world: World
    index: Index
    read: str  # by offset or by block of shards
    report: Report
    inline: cluster.ClusterContext | None  # we cluster ourselves; None: the cluster worker does
    stopping: Callable[[], bool]
    stage: str | None = None  # extract, cluster or train: do only that one

    def tell(self, name: EventName, **fields: Any) -> None:
        """An event of the gang, which rank 0 tells for all."""
        if self.world.is_first:
            self.report.event(name, **fields)


def build_trainer(context: Context) -> Trainer:
    """The method, its optimizers and the loader, from the recipe; weights depend on the seed."""
    recipe, world, data = context.recipe, context.world, context.recipe.data
    timeline = Timeline.of(recipe, len(context.index))
    method = build_method(recipe, world, new=not context.run.checkpoints()).to(world.device)
    method = global_norm(method, recipe.train.sync_bn, world)
    method = method.to(memory_format=torch.channels_last)  # twice as fast, on a CPU too
    optimizers = Optimizers(groups_of(method), recipe.train, method.owned(), world)
    return Trainer(
        world=world, index=context.index, method=method, model=wrapped(method, context),
        optimizers=optimizers,
        epoch_samples=timeline.epoch_steps * recipe.train.batch,
        loader=Loader(
            mirror_shards(context.index, data.stage, world, context.stopping, context.run.alive),
            data.workers,
            read="offset" if data.stage else context.read, scratch=data.scratch,
            max_pixels=data.max_pixels,
        ),
        feed=Feed(
            data, method.needs, world, recipe.seed, recipe.train.batch, recipe.train.accumulate
        ),
        config=recipe.train, max_bad=data.max_bad, seed=recipe.seed, folder=context.run.path,
        metrics=Metrics(context.run) if world.is_first else None, report=context.report,
        save=saver(
            context.run, recipe.keep.checkpoints, world, context.report, method, optimizers
        ),
        save_due=save_schedule(recipe, timeline),
        stopping=context.stopping,
    )  # fmt: skip


def build_method(recipe: Recipe, world: World, new: bool) -> Method:
    """The recipe's method around the recipe's backbone; a new run may inherit weights."""
    backbone = build_backbone(
        recipe.backbone.name, sobel=recipe.backbone.sobel,
        image_size=recipe.data.size, seed=recipe.seed,
    )  # fmt: skip
    if recipe.init.weights and new:
        warm_start.load_weights(backbone, recipe.init.weights)
    setting = Setting(recipe.method, recipe.cluster, recipe.seed, world)
    return METHODS[recipe.method.name](backbone, setting)


def groups_of(method: Method) -> list[Group]:
    """Return the method's parameters by role and name."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    return [
        Group("head" if role == "head" else "body", {names[p]: p for p in parameters})
        for role, parameters in method.param_groups().items()
    ]


def global_norm(method: Method, wanted: str, world: World) -> Method:
    """Batch norm over the whole global batch, so that any number of ranks gives the same step.

    `auto` is on where torch has it, on GPUs; a CPU's ranks each norm by their own share.
    """
    if wanted == "on" and world.device.type == "cpu":
        raise RecipeError("train.sync_bn=on needs GPUs: torch has no SyncBatchNorm for a CPU")
    if wanted == "off" or world.size == 1 or world.device.type == "cpu":
        return method
    convert: Callable[[Method], Method] = torch.nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(method)


def wrapped(method: Method, context: Context) -> torch.nn.Module:
    """The method as it is trained: compiled if asked, in DDP when there are several ranks."""
    model: torch.nn.Module = method
    if context.world.size > 1:
        ignore: Ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(method, list(method.owned()))
        # batch statistics are rank 0's, shared before every extraction: no need at every step.
        # DDP packs gradients anew after its first step, and more than two ranks add by place: a
        # resumed run would round differently. Looking for unused parameters keeps the first order.
        model = DistributedDataParallel(
            method, broadcast_buffers=False, find_unused_parameters=context.world.size > 2
        )
    return torch.compile(model) if context.recipe.train.compile else model  # type: ignore[return-value]


def save_schedule(recipe: Recipe, timeline: Timeline) -> Callable[[State], bool]:
    """A function that says whether a state is one to save, by `train.checkpoint`."""
    every = parse_cadence(recipe.train.checkpoint)
    by_epoch = every.unit == "epoch"
    steps = every.count * (timeline.epoch_steps if by_epoch else 1)

    def due(state: State) -> bool:
        if by_epoch and timeline.every.unit == "epoch":  # segments are epochs
            return state.offset == 0 and state.segment % every.count == 0
        return state.step % steps == 0

    return due


def embedder(context: Context, trainer: Trainer) -> Embedder:
    """Return the map from images (uint8, CPU) to features (float32, device)."""
    recipe = context.recipe
    return Embedder(trainer.method, recipe.data, recipe.train.precision, context.world.device)


def restore(context: Context, trainer: Trainer) -> tuple[State, Targets | None]:
    """The newest readable checkpoint, and the round that it was training on."""

    def say(text: str) -> None:
        context.report.event("warning", text=text)

    found = checkpoint.load_latest(context.run, say) if context.world.is_first else None
    folder = context.world.broadcast_object(
        found.folder if found else None
    )  # rank 0 chooses for all
    if folder is None:
        return State(), None
    state, parts = (found.state, found.parts) if found else checkpoint.load(folder, check=False)
    put_back(folder, parts, trainer.method, trainer.optimizers)
    context.tell("restored", step=state.step, segment=state.segment, round=state.round)
    return state, cluster.read_targets(context.run, state.round) if state.round >= 0 else None
