"""From the recipe to the parts that a rank works with: method, optimizers, loader, saved state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from deepclust.data.read.loader import Loader
from deepclust.data.read.mirror import mirror_shards
from deepclust.data.read.patience import Patience
from deepclust.data.read.substitutes import Labels
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import never
from deepclust.errors import DataError, RecipeError, RunDiffersError
from deepclust.methods import METHODS
from deepclust.methods.base import Method, Setting, Targets
from deepclust.methods.terms import OLD_NAMES
from deepclust.methods.terms.term import attach_terms
from deepclust.models import build_backbone, check_norms, check_sizes
from deepclust.optim.optimizers import Group, Optimizers
from deepclust.recipe import Recipe
from deepclust.recipe.named import part_of
from deepclust.run import checkpoint, labels
from deepclust.run.checkpoint import State
from deepclust.run.checkpoint_writer import CheckpointWriter
from deepclust.run.directory import Run
from deepclust.run.events import EventName
from deepclust.run.reporting import Metrics, Report
from deepclust.seeds.table import SeedTable, load
from deepclust.stages import cluster, kept_crops, warm_start, whole
from deepclust.stages.average import Average
from deepclust.stages.batches import Feed
from deepclust.stages.during import open_watched
from deepclust.stages.kept_crops import KeptCrops
from deepclust.stages.schedule import Timeline
from deepclust.stages.train import Trainer
from deepclust.stages.train_state import check_finite_weights, put_back
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
    inline: (
        cluster.ClusterContext | None
    )  # the ranks cluster themselves; None: the cluster worker does
    stopping: Callable[[], bool]
    stage: str | None = None  # extract, cluster or train: do only that one
    # `stopping` without the sign of life: a rank that waits for its readers may well hang
    asked: Callable[[], bool] = never

    def emit(self, name: EventName, **fields: Any) -> None:
        """Report an event of the worker group.

        The first rank does, for all.
        """
        if self.world.is_first:
            self.report.event(name, **fields)


def build_trainer(context: Context) -> Trainer:
    """Return the parts of training, from the recipe.

    Weights depend on the seed.
    """
    recipe, world, run = context.recipe, context.world, context.run
    table = read_labels(context)
    classes = () if table is None else tuple(table.names)
    method = build_method(
        recipe, world, not run.checkpoints(), len(context.index), classes,
        lambda text: context.emit("loaded", text=text),
    )  # fmt: skip
    for name in recipe.terms:
        if name in OLD_NAMES and not run.checkpoints():  # an old run goes on without a word
            context.emit("warning", text=OLD_NAMES[name])
    method = method.to(world.device)
    method = convert_norms(method, recipe.train.sync_bn, world)
    if world.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shapes
    check_batch(method, recipe)
    attach_terms(method)
    method = method.to(memory_format=torch.channels_last)  # twice as fast, on a CPU too
    return Trainer(
        recipe=recipe,
        run=run,
        world=world,
        timeline=Timeline.of(recipe, len(context.index)),
        loader=build_loader(context, table),
        feed=Feed(recipe, context.index, context.read, world, table),
        method=method,
        model=wrap_ddp(method, world, compiled=recipe.train.compile),
        optimizers=Optimizers(parameter_groups(method), recipe.train, method.owned(), world),
        writer=build_writer(context),
        report=context.report,
        stopping=context.stopping,
        metrics=Metrics(run) if world.is_first else None,
        watched=open_watched(recipe, context.index, run, world),
        kept=KeptCrops(kept_crops.room(world.size), world.device.type == "cuda"),
    )


def build_writer(context: Context) -> CheckpointWriter:
    """Return what writes the run's checkpoints, and says that one is there."""

    def done(step: int) -> None:
        context.report.event("checkpoint", step=step)

    keep = context.recipe.keep.checkpoints
    return CheckpointWriter(context.run, keep, context.world, done, check_finite_weights)


def build_method(
    recipe: Recipe,
    world: World,
    new: bool,
    samples: int = 0,
    classes: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Method:
    """Return the recipe's method around the recipe's backbone.

    A new run may inherit weights, and `tell` hears which. `samples` is for what has a row for each,
    0 without training. `classes` are those of the seeds.
    """
    sizes = [kind.size for kind in recipe.method.crops(recipe.data)]
    backbone = build_backbone(
        recipe.backbone.name,
        sobel=recipe.backbone.sobel,
        image_size=recipe.data.size,
        seed=recipe.seed,
        sizes=sizes,
    )
    check_sizes(backbone, sizes)
    if recipe.init.weights and new:
        taken = warm_start.load_weights(backbone, recipe.init.weights)
        tell(taken + warm_start.other_normalisation(recipe.init.weights, recipe.data))
    setting = Setting(
        recipe.method, recipe.cluster, recipe.seed, world, recipe.terms, samples, classes
    )
    method: Method = part_of(recipe.method.name, METHODS, "method")(backbone, setting)
    if recipe.train.average_from is not None:
        method.average = Average(method)
    return method


def check_batch(method: Method, recipe: Recipe) -> None:
    """Raise RecipeError where batch norms cannot norm a part of a batch, before any work.

    They need two values of a channel. Of one image that is the number of pixels of its last map,
    which may be one.
    """
    train = recipe.train
    count = train.batch // (train.ranks * train.accumulate)
    rows = count * min(kind.count for kind in recipe.method.crops(recipe.data))
    norms = [m for m in method.modules() if isinstance(m, _NormBase) and m.training]
    if count > 1 or not norms or any(isinstance(m, torch.nn.SyncBatchNorm) for m in norms):
        return
    try:
        for kind in recipe.method.crops(recipe.data):
            check_norms(method.trunk, max(1, rows), kind.size)
    except ValueError as error:
        raise RecipeError(
            f"train.batch: {train.batch} images in {train.ranks} ranks and {train.accumulate} "
            f"parts leave one for each, and {recipe.backbone.name} has batch norms, which need "
            f"two. Set train.batch={2 * train.ranks * train.accumulate} or more, or fewer parts"
        ) from error


def build_loader(context: Context, table: SeedTable | None = None) -> Loader:
    """Return the loader of this rank, with a local copy of the shards if the recipe wants one."""
    data = context.recipe.data
    index = mirror_shards(
        context.index, data.stage, context.world, context.stopping, context.run.alive
    )
    return Loader(
        index,
        data.readers(),
        read="offset" if data.stage else context.read,
        scratch=data.scratch,
        max_pixels=data.max_pixels,
        patience=Patience(context.asked, 2 * context.recipe.train.hang, context.report.alive),
        labels=None if table is None else Labels(table.sample_ids, table.classes),
        decode=data.decode,
        device=context.world.device,
    )


def read_labels(context: Context) -> SeedTable | None:
    """Return the labels of `seeds`, on every rank, where batches are drawn by them or hold them.

    Raises `RunDiffersError` when they are not those that the run began with, and `DataError` as
    `seeds.table.load` does.
    """
    recipe, run = context.recipe, context.run
    if recipe.seeds is None:
        return None
    if not (recipe.seeds.share or recipe.uses_labels or recipe.seeds_judge):
        return None
    seeds = load(context.index, recipe.seeds, recipe.seed)
    if recipe.cluster is None:  # else the clustering reports them
        for note in seeds.notes:
            context.emit("warning", text=note)
    if recipe.seeds_judge:  # read all the same, so that what is wrong with them is known now
        return None
    for note in check_labels(recipe, seeds.table, len(context.index)):
        context.emit("warning", text=note)
    began = labels.read(run)
    if began is not None and began.digest != seeds.table.digest:
        raise RunDiffersError(
            f"the labels of {recipe.seeds.labels} are not those that {context.run.path} began "
            "with. Restore them, or start a new run."
        )
    if context.world.is_first and (began is None or not began.classes):
        labels.write(run, seeds.table.digest, seeds.table.counts.tolist(), seeds.table.names)
    return seeds.table


def check_labels(recipe: Recipe, table: SeedTable, samples: int) -> list[str]:
    """Return what the user should know of labels that batches hold.

    Raises `DataError` for a single class: there must be two to tell apart.
    """
    seeds = recipe.seeds
    assert seeds is not None
    if not recipe.uses_labels:
        return []
    if len(table.names) < 2:
        raise DataError(
            f"seeds.labels: {seeds.labels} has one class only, {table.names[0]!r}, and "
            f"{recipe.method.name} learns to tell classes apart. Label samples of a second class."
        )
    usual = recipe.train.batch * len(table) / samples
    if seeds.share == 0 and usual < 1:
        return [
            f"seeds.share=0: a batch of {recipe.train.batch} holds {usual:.2g} labelled samples on "
            "average. Set seeds.share, for example to 0.25"
        ]
    if 0 < seeds.share < 1 and len(table) == samples:
        return [
            f"all {samples} samples are labelled, so every batch is, whatever seeds.share says. "
            "Set seeds.share=1, or seeds.per_class to use fewer labels"
        ]
    return []


def parameter_groups(method: Method) -> list[Group]:
    """Return the trained parameters by role: a head is what a round renews, the body the rest."""
    named = dict(method.named_parameters())
    head = {
        f"{path}.{name}": parameter
        for path in method.renewed()
        for name, parameter in method.get_submodule(path).named_parameters()
        if parameter.requires_grad
    }
    body = {n: p for n, p in named.items() if p.requires_grad and n not in head}
    return [Group("body", body), Group("head", head)]


def convert_norms(method: Method, wanted: str, world: World) -> Method:
    """Let batch norms use the whole global batch, so that any number of ranks steps alike.

    `auto` is on where torch can, on GPUs. On a CPU each rank norms by its own share. timm's norms
    hold their activation, which torch's converter would drop, so timm converts those.
    """
    if wanted == "on" and world.device.type == "cpu":
        raise RecipeError("train.sync_bn=on needs GPUs: torch has no SyncBatchNorm for a CPU")
    if wanted == "off" or world.size == 1 or world.device.type == "cpu":
        return method
    return synchronised(method)


def synchronised(method: Method) -> Method:
    """Return the method with every batch norm over all ranks, and otherwise as it was."""
    convert: Callable[[Method], Method] = torch.nn.SyncBatchNorm.convert_sync_batchnorm
    if any(type(module).__module__.startswith("timm.") for module in method.modules()):
        from timm.layers.norm_act import convert_sync_batchnorm as convert  # slow to import
    return convert(method)


def wrap_ddp(method: Method, world: World, compiled: bool = False) -> torch.nn.Module:
    """Return the method as it is trained: compiled if asked, in DDP when there are ranks."""
    model: torch.nn.Module = method
    if world.size > 1:
        ignore: Ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(method, list(method.owned()))
        # Batch statistics of rank 0 are broadcast before every extraction, not at every step.
        # DDP packs gradients again after its first step, and more than two ranks add by place: a
        # resumed run would round differently. Looking for unused parameters keeps the first order.
        with warnings.catch_warnings():  # the new name of the option still syncs buffers at first
            warnings.filterwarnings("ignore", "broadcast_buffers", FutureWarning)
            model = DistributedDataParallel(
                method, broadcast_buffers=False, find_unused_parameters=world.size > 2,
                gradient_as_bucket_view=True,
            )  # fmt: skip
    return torch.compile(model) if compiled else model  # type: ignore[return-value]


def restore(context: Context, trainer: Trainer) -> tuple[State, Targets | None]:
    """Load the newest readable checkpoint, and the round that it was training on."""
    latest = None
    if context.world.is_first:
        latest = whole.latest_whole(
            context.run,
            context.recipe,
            trainer.timeline,
            lambda text: context.emit("warning", text=text),
        )
    context.world.barrier()  # without a time limit, as it reads whole checkpoints
    # the first rank chooses for all
    name = context.world.broadcast_object(str(latest.folder) if latest else None)
    if name is None:
        return State(), None
    folder = Path(name)
    if latest is None:
        state, parts = checkpoint.load(folder, check=False)
    else:
        state, parts = latest.state, latest.parts
    put_back(folder, parts, trainer.method, trainer.optimizers)
    context.emit("restored", step=state.step, segment=state.segment, round=state.round)
    return state, cluster.read_targets(context.run, state.round) if state.round >= 0 else None
