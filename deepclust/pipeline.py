"""The chain itself, the file to read first: cluster again if it is due, train, save; repeat.

    tar shards -> features -> whitening -> k-means -> assignments -> uniform plan -> DDP training
         ^                                                                              |
         +-------------------------------- next round <---------------------------------+

Every rank runs `run` with the same recipe. A segment is the stretch between two plans: an epoch,
or the steps of a round. What is on disk decides where it begins: a finished stage is skipped, and
the newest checkpoint says which step of which plan comes next.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from deepclust import checkpoint, cluster, inherit, train
from deepclust.checkpoint import State
from deepclust.data.index import Index
from deepclust.data.plan import EpochPlan
from deepclust.data.reader import Loader
from deepclust.data.views import to_float
from deepclust.errors import RequeueWanted
from deepclust.export import export_backbone
from deepclust.extract import Pass, extract, project
from deepclust.methods import METHODS
from deepclust.methods.base import Targets
from deepclust.metrics import Metrics, Report
from deepclust.models import build_backbone
from deepclust.optim import Optimizers, Schedule
from deepclust.recipe import Recipe, parse_cadence
from deepclust.rundir import Run, is_done, prune
from deepclust.timeline import Timeline
from deepclust.train import Trainer, train_segment
from deepclust.world import World


@dataclass(frozen=True)
class Context:
    """What the chain runs with: the recipe, the run, this rank's world, and its ways out."""

    recipe: Recipe
    run: Run
    world: World
    index: Index
    report: Report
    inline: cluster.Job | None  # we cluster ourselves; None: the cluster worker does
    stopping: Callable[[], bool]
    stage: str | None = None  # extract, cluster or train: do only that one


def run(context: Context) -> None:
    """Take the run from where it is to its end."""
    recipe, timeline = context.recipe, Timeline.of(context.recipe, len(context.index))
    trainer = build_trainer(context)
    try:
        state, targets = restore(context, trainer)
        while state.segment < timeline.segments:
            if timeline.refresh_due(state):
                trainer.save(state)
                targets = refresh(context, trainer, timeline.round_of(state))
                if targets is None:
                    return
                state = state.in_round(targets.round)
                trainer.optimizers.renew_head(trainer.method.adopt(targets, recipe.seed))
            if context.stage in ("extract", "cluster"):
                return
            assert targets is not None
            plan = EpochPlan.build(
                targets.ids, seed=recipe.seed, epoch=state.segment, steps=timeline.steps(state),
                global_batch=recipe.train.batch, mode=recipe.method.sampling,
            )  # fmt: skip
            assignments = context.run.round(targets.round) / "assignments" / "assignments.npy"
            state = train_segment(trainer, plan, targets, assignments, state).after_segment()
            if trainer.save_due(state):
                trainer.save(state)
        trainer.save(state)
        finish(context, trainer)
    finally:
        trainer.loader.close()
        if trainer.metrics is not None:
            trainer.metrics.close()


def refresh(context: Context, trainer: Trainer, number: int) -> Targets | None:
    """Make round `number`: extract, whiten, cluster. Each stage that is done is skipped.

    None when only one stage was wanted and it ends before the assignments.
    """
    run, world = context.run, context.world
    folder = run.round(number)
    if is_done(folder / "assignments"):
        return cluster.read_targets(run, number)
    if context.stage == "train":
        return None
    if number == 0 and context.recipe.init.assignments:
        if world.is_first:
            inherit.import_assignments(run, context.recipe, context.index)
        await_stage(context, number, "assignments")
        return cluster.read_targets(run, 0)
    world.share_tensors(list(trainer.method.buffers()))  # batch statistics of rank 0, everywhere
    job = Pass(
        run, number, world, context.index, trainer.loader,
        context.recipe.data, context.report, context.stopping,
    )  # fmt: skip
    extract(job, embedder(context, trainer))
    await_stage(context, number, "whitening")
    project(job, cluster.read_whitening(folder))
    if context.stage == "extract":
        return None
    await_stage(context, number, "assignments")
    if world.is_first:
        shutil.rmtree(folder / "raw", ignore_errors=True)
        prune([run.round(r) / "features" for r in run.rounds()], context.recipe.keep.features)
        statistics = cluster.read_statistics(run, number)
        assert trainer.metrics is not None
        trainer.metrics.record("round", number, **statistics)
    return cluster.read_targets(run, number)


def await_stage(context: Context, number: int, stage: str) -> None:
    """Do the cluster worker's part if it is ours; then wait for the stage's files."""
    if context.inline is not None:
        cluster.advance(context.inline, number)
    folder = context.run.round(number) / stage
    if not cluster.wait_for(folder, context.stopping):
        raise RequeueWanted(f"stopped while waiting for {folder}")
    context.world.barrier()


def embedder(context: Context, trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Images (uint8, CPU) to features (float32, device), in eval mode, without gradients."""
    data, device = context.recipe.data, context.world.device

    def embed(images: Tensor) -> Tensor:
        trainer.method.eval()
        with torch.inference_mode(), train.autocast(trainer):
            return trainer.method.embed(
                to_float(images.to(device, non_blocking=True), data.mean, data.std)
            ).float()

    return embed


def build_trainer(context: Context) -> Trainer:
    """The method, its optimizers and the loader, from the recipe; weights depend on the seed."""
    recipe, world, run = context.recipe, context.world, context.run
    backbone = build_backbone(
        recipe.backbone.name, sobel=recipe.backbone.sobel,
        image_size=recipe.data.size, seed=recipe.seed,
    )  # fmt: skip
    if recipe.init.weights:
        inherit.load_weights(backbone, recipe.init.weights)
    method = METHODS[recipe.method.name](
        backbone, recipe.cluster.k, recipe.cluster.dim, recipe.method.head, recipe.seed
    ).to(world.device)
    model: torch.nn.Module = method
    if world.device.type == "cuda":
        method = method.to(memory_format=torch.channels_last)
    if world.size > 1:
        # batch statistics are rank 0's, shared before every extraction: no need at every step
        model = DistributedDataParallel(method, broadcast_buffers=False)
    if recipe.train.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    optimizers = Optimizers(method.param_groups(), recipe.train)
    every = parse_cadence(recipe.train.checkpoint)

    def save(state: State) -> None:
        if world.is_first:
            parts = {"model": dict(method.state_dict()), **optimizers.state()}
            if checkpoint.save(run, state, parts, recipe.keep.checkpoints):
                context.report.event("checkpoint", step=state.step)

    def save_due(state: State) -> bool:
        if every.unit == "step":
            return state.step % every.count == 0
        return state.offset == 0 and state.segment % every.count == 0

    return Trainer(
        world=world, index=context.index, method=method, model=model, optimizers=optimizers,
        loader=Loader(
            context.index, recipe.data.workers, read=recipe.data.read,
            scratch=recipe.data.scratch, max_pixels=recipe.data.max_pixels,
        ),
        schedule=Schedule(recipe.train, len(context.index)), data=recipe.data,
        config=recipe.train, seed=recipe.seed, folder=run.path,
        metrics=Metrics(run) if world.is_first else None, report=context.report,
        save=save, save_due=save_due, stopping=context.stopping,
    )  # fmt: skip


def restore(context: Context, trainer: Trainer) -> tuple[State, Targets | None]:
    """The newest readable checkpoint, and the round that it was training on."""

    def say(text: str) -> None:
        context.report.event("warning", text=text)

    found = checkpoint.load_latest(context.run, say, repair=context.world.is_first)
    context.world.barrier()
    if found is None:
        return State(), None
    state, parts = found
    trainer.method.load_state_dict(parts.pop("model"))
    trainer.optimizers.load_state(parts)
    context.report.event("restored", step=state.step, segment=state.segment, round=state.round)
    return state, cluster.read_targets(context.run, state.round) if state.round >= 0 else None


def finish(context: Context, trainer: Trainer) -> None:
    """Export the backbone and say that the run is done."""
    if context.world.is_first:
        out = context.run.path / "export" / "backbone.safetensors"
        export_backbone(
            trainer.method.backbone, out, "safetensors", meta=inherit.export_meta(context.recipe)
        )
        context.report.event("exported", file=str(out))
    context.world.barrier()
