"""The chain itself, the file to read first: cluster again if it is due, train, save; repeat.

    tar shards -> features -> whitening -> k-means -> assignments -> uniform plan -> DDP training
         ^                                                                              |
         +-------------------------------- next round <---------------------------------+

Every rank runs `run` with the same recipe. A segment is the stretch between two plans: an epoch,
or the steps of a round. What is on disk decides where it begins: a finished stage is skipped, and
the newest checkpoint says which step of which plan comes next.

With `cluster.overlap` the chain is one round deep. At a boundary the round that was begun at the
boundary before is adopted. Then the features of the next one are made. The cluster worker runs its
k-means while the ranks train on, and the next boundary waits for it.

After the last step a final round is made with the weights that were exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from deepclust.errors import RecipeError, RequeueWanted
from deepclust.export.backbone import Head, export_backbone
from deepclust.files import remove_folder
from deepclust.methods.base import Targets
from deepclust.methods.parts.bank import find_bank
from deepclust.run import final_round
from deepclust.run.checkpoint import State
from deepclust.run.directory import is_done, prune
from deepclust.run.round_files import find_whitening, read_statistics
from deepclust.run.settled import settle
from deepclust.stages import average, cluster, warm_start
from deepclust.stages.bank import fill_bank, write_bank
from deepclust.stages.build import Context, build_trainer, restore
from deepclust.stages.during import evaluate_now, is_recorded, norm_statistics
from deepclust.stages.extract import ExtractContext, extract
from deepclust.stages.project import project, write_no_rows
from deepclust.stages.raw_memory import RawMemory
from deepclust.stages.train import Trainer, train_segment
from deepclust.trained.class_means import at_end
from deepclust.trained.classifier import head_of


def run(context: Context) -> None:
    """Take the run from where it is to its end."""
    trainer = build_trainer(context)
    recipe, timeline = context.recipe, trainer.timeline
    try:
        state, targets = restore(context, trainer)
        began = state.step
        if context.world.is_first:
            if not timeline.finished(state):
                final_round.drop(context.run)  # of a shorter run, or a checkpoint that was lost
            settle(context.run)
        context.world.barrier()
        if timeline.evaluate_due(state) and not is_recorded(trainer, state):
            evaluate_now(trainer, state)  # a kill came between the checkpoint and the record
        while not timeline.finished(state):
            if timeline.refresh_due(state):
                trainer.save(state)
                targets = refresh(context, trainer, timeline.round_of(state))
                if targets is None:  # only one stage was wanted
                    return check_stage(context, timeline.round_of(state), state.step - began)
                state = state.in_round(targets.round)
                trainer.optimizers.renew(trainer.method.adopt(targets, recipe.seed))
            if context.stage in ("extract", "cluster"):
                return
            if (ahead := timeline.round_ahead(state)) is not None:
                trainer.save(state)  # before a refresh here, which has saved the same step
                begin_round(context, trainer, ahead)
            plan = trainer.feed.plan(timeline, state, targets)
            context.emit(
                "training", round=state.round, segment=state.segment, step=state.step,
                steps=timeline.all_steps, rounds_left=timeline.rounds_after(state),
            )  # fmt: skip
            state = train_segment(trainer, plan, targets, state).after_segment()
            if timeline.save_due(state):
                trainer.begin_save(state)
            if timeline.evaluate_due(state):
                evaluate_now(trainer, state)
        trainer.save(state)
        average.settle(trainer, targets, state)
        finish(context, trainer, state.step)
        if targets is not None and recipe.clustering.final:
            make_final_round(context, trainer, state)
    finally:
        trainer.loader.close()
        trainer.writer.close()
        if trainer.metrics is not None:
            trainer.metrics.close()


def refresh(context: Context, trainer: Trainer, number: int) -> Targets | None:
    """Round `number`, made if it is not there, or None when only one stage was wanted."""
    assignments = context.run.round(number) / "assignments"
    # rank 0 decides for all: a cluster worker may finish the round between two ranks' looks
    if not context.world.broadcast_object(is_done(assignments)):
        if context.stage == "train":
            return None
        warn_if_late(context, number)
        make_round(context, trainer, number)
        if context.stage == "extract":
            return None
    take_first_rows(context, trainer, number)
    if context.world.is_first:
        tidy(context, trainer, number)
    context.world.barrier()
    return cluster.read_targets(context.run, number)


def begin_round(context: Context, trainer: Trainer, number: int) -> None:
    """Make the features of a round with the present weights.

    Its k-means is not waited for.
    """
    if not context.world.broadcast_object(is_done(context.run.round(number) / "assignments")):
        make_features(context, trainer, number)


def warn_if_late(context: Context, number: int) -> None:
    """Warn when a round that should have been begun one boundary earlier is only made now."""
    begun = is_done(context.run.round(number) / "features")
    if context.recipe.clustering.overlap and number > 0 and not begun:
        why = "the run has been made longer, or that round's features were lost"
        text = f"round {number} is made from the present weights, not those of a boundary ago: "
        context.emit("warning", text=text + why)


def check_stage(context: Context, number: int, steps: int) -> None:
    """Raise when `deepclust train` could not train, because the next round is not there yet."""
    if context.stage == "train" and steps == 0:
        raise RecipeError(
            f"round {number} has no assignments yet: deepclust cluster {context.run.path}"
        )


def make_round(context: Context, trainer: Trainer, number: int) -> None:
    """Extract, whiten, project and cluster.

    A stage that is done is skipped.
    """
    if number == 0 and context.recipe.init.assignments:
        if context.world.is_first:
            warm_start.import_assignments(context.run, context.recipe, context.index)
    else:
        make_features(context, trainer, number)
    if context.stage != "extract":
        await_stage(context, number, "assignments")


def make_final_round(context: Context, trainer: Trainer, state: State) -> None:
    """Make the round that belongs to the exported weights.

    So clusters, centroids and weights of a finished run belong together. Its number is the next.
    """
    number = state.round + 1
    if context.world.is_first:
        final_round.begin(context.run, number, state.step)
    context.world.barrier()
    if not context.world.broadcast_object(is_done(context.run.round(number) / "assignments")):
        make_features(context, trainer, number, final=True)
        await_stage(context, number, "assignments")
    if context.world.is_first:
        tidy(context, trainer, number)


def make_features(context: Context, trainer: Trainer, number: int, *, final: bool = False) -> None:
    """Write what a round is made of, with the present weights: extract, whiten, project.

    A bank has rows without an extraction, once it was filled, and a balanced start needs none. A
    `final` round has rows of the last weights, which a bank has not.
    """
    refresh, bank = context.recipe.method.round, find_bank(trainer.method)
    assert refresh is not None
    job = extraction(context, trainer, number)
    if number == 0 and refresh.first == "balanced":
        write_no_rows(job)
        return
    if bank is not None and bank.is_filled and not final:
        write_bank(job, bank)
        return
    context.world.broadcast(norm_statistics(trainer.method))  # those of rank 0, on every rank
    extract(job, trainer.embedder.clustered)
    if refresh.whiten:
        await_stage(context, number, "whitening")
    scorer = trainer.method.scorer() if refresh.kind == "sinkhorn" else None
    project(job, find_whitening(context.run.round(number)), refresh.unit, scorer)


def extraction(context: Context, trainer: Trainer, number: int) -> ExtractContext:
    """Return the context of a round's features; moments are for a whitening alone."""
    refresh, cluster = context.recipe.method.round, context.recipe.cluster
    where = "disk" if cluster is None else cluster.raw
    memory = RawMemory(where, context.world.device, context.world.size)
    return ExtractContext(
        context.run, number, context.world, context.index, trainer.loader,
        context.recipe.data, context.report, context.stopping,
        moments=refresh is not None and refresh.whiten, memory=memory,
        kept=trainer.kept,
    )  # fmt: skip


def take_first_rows(context: Context, trainer: Trainer, number: int) -> None:
    """Fill the method's bank, if it has one that was never filled, with the round's features.

    They are extracted if they are gone, or were never there (`init.assignments`).
    """
    bank = find_bank(trainer.method)
    if bank is None or bank.is_filled:
        return
    features = context.run.round(number) / "features"
    if not context.world.broadcast_object(is_done(features)):
        make_features(context, trainer, number)
    fill_bank(extraction(context, trainer, number), bank)


def tidy(context: Context, trainer: Trainer, number: int) -> None:
    """Drop what the finished round no longer needs, and write its statistics as metrics."""
    run = context.run
    remove_folder(run.round(number) / "raw", run.alive)
    features = [run.round(r) / "features" for r in run.rounds()]
    prune(features, context.recipe.keep.features, run.alive)
    assert trainer.metrics is not None
    trainer.metrics.record("round", number, **read_statistics(run, number))


def await_stage(context: Context, number: int, stage: str) -> None:
    """Do the cluster worker's part if it is ours; then wait for the stage's files."""
    began = time.monotonic()
    if context.inline is not None:
        cluster.advance(context.inline, number)
    folder = context.run.round(number) / stage
    by_ranks = context.recipe.cluster is not None and context.recipe.clusters_inline
    asked = context.asked if by_ranks else context.stopping
    stopped = not cluster.wait_for(folder, asked)
    context.world.barrier()  # one may have solved and written for all
    if context.world.max_int(int(stopped)):
        raise RequeueWanted(f"stopped while waiting for {folder}")
    context.emit("waited", round=number, stage=stage, seconds=time.monotonic() - began)


def finish(context: Context, trainer: Trainer, step: int) -> None:
    """Export the backbone and say that the run is done."""
    if context.world.is_first:
        out = context.run.path / "export" / "backbone.safetensors"
        answering = at_end(context.run, trainer.embedder, step, warned(context), context.index)
        head = head_of(context.run, context.recipe, answering)
        own = head if isinstance(head, Head) else None
        meta = warm_start.export_meta(context.run)
        written = export_backbone(trainer.method.trunk, out, "safetensors", meta=meta, head=own)
        context.report.event("exported", file=str(out), hash=written.hash)
    context.world.barrier()


def warned(context: Context) -> Callable[[str], None]:
    """Return what reports a text as a warning."""
    return lambda text: context.emit("warning", text=text.removeprefix("warning: "))
