"""Training on the pseudo-labels of one round: the one visible loop.

The plan says which samples form each global batch. This rank takes its share, in `accumulate`
parts. Batches, crops and dropout depend on (seed, step, rank) alone. So a run that was killed and
resumed computes the same steps, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from deepclust.data.plan import EpochPlan
from deepclust.data.read.loader import Bad, Loader
from deepclust.errors import DataError, NumericalError, RequeueWanted
from deepclust.files import append_json, write_json
from deepclust.methods.base import Batch, Method, Now, Targets
from deepclust.methods.embed import Embedder, autocast
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe import Recipe
from deepclust.run.checkpoint import State
from deepclust.run.checkpoint_writer import CheckpointWriter
from deepclust.run.collapse import Watch
from deepclust.run.directory import Run
from deepclust.run.reporting import Metrics, Report
from deepclust.stages.ahead import Ahead, Ready
from deepclust.stages.average import average_of
from deepclust.stages.batches import Feed
from deepclust.stages.during import Watched, evaluate_now
from deepclust.stages.kept_crops import KeptCrops
from deepclust.stages.schedule import Timeline
from deepclust.stages.train_state import begin_save
from deepclust.world import World, derive


@dataclass
class Trainer:
    """The parts that training needs.

    `model` is the method, wrapped in DDP when there are ranks.
    """

    recipe: Recipe
    run: Run
    world: World
    timeline: Timeline
    loader: Loader
    feed: Feed
    method: Method
    model: torch.nn.Module
    optimizers: Optimizers
    writer: CheckpointWriter
    report: Report
    stopping: Callable[[], bool]
    metrics: Metrics | None  # of the first rank
    watch: Watch = field(default_factory=Watch)
    kept: KeptCrops = field(default_factory=KeptCrops)  # of an extraction, for the next one
    watched: Watched | None = None  # labelled images to evaluate on, if the recipe wants it

    def begin_save(self, state: State) -> None:
        """Begin a checkpoint unless the step has one; it is written while the training goes on.

        All ranks call it.
        """
        begin_save(state, self.writer, self.method, self.optimizers)

    def save(self, state: State) -> None:
        """Write a checkpoint unless the step has one, and wait until it is there.

        All ranks call it.
        """
        self.begin_save(state)
        self.writer.settle()

    @property
    def embedder(self) -> Embedder:
        """The map from images to the features of a round."""
        precision = self.recipe.train.precision
        return Embedder(self.method, self.recipe.data, precision, self.world.device)


@dataclass
class Meter:
    """Sums since the last line of metrics."""

    waited_before: float
    scalars: dict[str, Tensor] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    parts: int = 0
    images: int = 0
    bad: list[str] = field(default_factory=list)
    unjudged: int = 0  # of them, those that `judge_bad` has not seen
    started: float = field(default_factory=time.monotonic)

    def add(self, scalars: dict[str, Tensor], images: int, bad: list[Bad]) -> None:
        """Count one part of a step."""
        for name, value in scalars.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value.detach()
        self.parts += 1
        self.images += images
        self.bad += [one.reason for one in bad]
        self.unjudged += len(bad)


@dataclass(frozen=True)
class Totals:
    """What the ranks agreed on: means of the scalars, and sums."""

    means: dict[str, float]
    images: float
    bad: int
    stop: bool  # at least one rank was asked to stop


def train_segment(
    trainer: Trainer, plan: EpochPlan, targets: Targets | None, state: State
) -> State:
    """Train from `state.offset` to the end of the plan, and return the state after it.

    `targets` are None for a method that trains without a clustering. Raises NumericalError on a
    loss that is not finite, RequeueWanted when asked to stop.
    """
    config = trainer.recipe.train
    trainer.model.train()
    meter = Meter(trainer.loader.waited)
    loaded = trainer.loader.stream(trainer.feed.requests(plan, targets, state))
    make = partial(trainer.feed.to_batch, targets=targets, segment=state.segment, now=Now())
    parts = Ahead(loaded, make, trainer.world.device)
    while state.offset < plan.steps:
        rate = train_step(trainer, meter, parts, targets, state)
        judge_bad(trainer, meter, state)
        trainer.writer.poll()
        state = state.after_step(config.batch)

        # Ranks agree on a stop where they meet for the metrics. A single rank stops at once.
        at_end = state.offset == plan.steps
        save_due = trainer.timeline.save_due(state)
        score_due = trainer.timeline.evaluate_due(state) and not at_end
        asked = trainer.world.size == 1 and trainer.stopping()
        if not (state.step % config.log == 0 or at_end or save_due or score_due or asked):
            continue
        totals = reduce_totals(trainer, meter)
        check_finite(trainer, totals, meter, plan, state)
        report_bad(trainer, totals.bad, meter, state)
        log_metrics(trainer, totals, meter, plan, state, rate)
        if save_due and not at_end:
            trainer.begin_save(state)
        if score_due:
            evaluate_now(trainer, state)
        meter = Meter(trainer.loader.waited)
        if totals.stop:
            trainer.save(state)
            trainer.world.barrier()  # no rank leaves before the first has written
            raise RequeueWanted(f"stopped on request at step {state.step}; resume continues there")
    trainer.writer.settle()
    return state


def train_step(
    trainer: Trainer,
    meter: Meter,
    parts: Iterator[Ready[Batch]],
    targets: Targets | None,
    state: State,
) -> float:
    """Take one optimizer step and return its learning rate.

    The method's hooks are called here.
    """
    method, accumulate = trainer.method, trainer.recipe.train.accumulate
    now = trainer.timeline.now(state)
    torch.manual_seed(derive(trainer.recipe.seed, "step", state.step, trainer.world.rank))
    rate = trainer.optimizers.set_schedule(now)
    for part in range(accumulate):
        ready = next(parts)
        # Before the collectives: so a rank whose reader hangs is silent longer than the others.
        trainer.report.alive()
        batch = replace(ready.batch, now=now)
        method.before_step(batch)
        scalars = forward_backward(trainer, batch, last=part == accumulate - 1)
        meter.add(scalars, len(batch.sample_ids), ready.loaded.bad)
    drop_gradients(method, method.frozen(now))
    meter.norms.append(trainer.optimizers.step())
    method.after_step(now)
    average = average_of(method)
    if average is not None and (count := trainer.timeline.averaged(state.step + 1)):
        average.follow(method, count)
    return rate


def forward_backward(trainer: Trainer, batch: Batch, last: bool) -> dict[str, Tensor]:
    """Compute the gradients of one part of a step.

    The ranks' gradients meet at the last one. The backward pass is outside autocast. In it what a
    method computes in float32, autocast or not, would get gradients of bf16 products.
    """
    config, world = trainer.recipe.train, trainer.world
    with no_sync(trainer.model, last or world.size == 1):
        with autocast(config.precision, world.device):
            scalars: dict[str, Tensor] = trainer.model(batch)
            loss = scalars["loss"] / config.accumulate
        torch.autograd.backward(loss)
    return scalars


def no_sync(model: torch.nn.Module, meet: bool) -> contextlib.AbstractContextManager[None]:
    """Keep gradients on their rank, unless they shall meet; a compiled model has DDP inside."""
    if meet:
        return contextlib.nullcontext()
    kept: contextlib.AbstractContextManager[None] = cast(Any, model).no_sync()
    return kept


def drop_gradients(method: Method, names: Iterable[str]) -> None:
    """Let parameters keep still: without a gradient an optimizer leaves them alone."""
    for name in names:
        method.get_parameter(name).grad = None


def reduce_totals(trainer: Trainer, meter: Meter) -> Totals:
    """Add the meters over the ranks."""
    facts = [meter.parts, meter.images, len(meter.bad), trainer.stopping()]
    numbers = [*facts, *map(float, meter.scalars.values())]
    summed = torch.tensor(numbers, dtype=torch.float64).to(trainer.world.device)
    parts, images, bad, stop, *sums = trainer.world.all_reduce(summed).tolist()
    means = {name: total / parts for name, total in zip(meter.scalars, sums, strict=True)}
    return Totals(means, images, int(bad), bool(stop))


def check_finite(
    trainer: Trainer, totals: Totals, meter: Meter, plan: EpochPlan, state: State
) -> None:
    """Raise NumericalError for a loss that is not finite, and write down its sample ids."""
    if math.isfinite(totals.means["loss"]):
        return
    steps = meter.parts // trainer.recipe.train.accumulate
    first, file = state.step - steps, trainer.run.path / "nan-batch.json"
    if trainer.world.is_first:
        rows = plan.ids.reshape(plan.steps, -1)[state.offset - steps : state.offset]
        write_json(file, {"step": first, "ids": rows.tolist()})
    of_round = "" if state.round < 0 else f" (round {state.round})"
    raise NumericalError(
        f"the loss is not finite in steps {first + 1} to {state.step}{of_round}. "
        f"Their sample ids are in {file}. The last checkpoint is "
        "sound: lower train.lr in a new run that starts from it (init.weights), or look at those "
        "images."
    )


def judge_bad(trainer: Trainer, meter: Meter, state: State) -> None:
    """Raise DataError as soon as too many samples of `train.log` steps had to be replaced.

    The rank that meets one too many raises it, whatever the other ranks do.
    """
    new, meter.unjudged = meter.unjudged, 0
    if not new:
        return
    config, limit = trainer.recipe.train, trainer.recipe.data.max_bad
    window, samples = state.step // config.log, config.log * config.batch
    count = trainer.world.total(f"replaced-{state.round}-{window}", new)
    if count > max(1.0, limit * samples):
        report_bad(trainer, count, meter, state)
        listed = "\n".join(f"  {line}" for line in meter.bad[:20])
        raise DataError(
            f"{count} of the {samples} samples of steps {window * config.log + 1} to "
            f"{(window + 1) * config.log} could not be read by now, more than data.max_bad={limit} "
            f"allows:\n{listed}\nRepair the shards and resume."
        )


def report_bad(trainer: Trainer, count: int, meter: Meter, state: State) -> None:
    """Report the samples that were replaced: `count` on all ranks, those of this rank by name."""
    if not count:
        return
    if trainer.world.is_first:
        trainer.report.event("replaced", step=state.step, count=count, first=meter.bad[:5])
    file = trainer.run.path / "logs" / "replaced.jsonl"
    append_json(file, {"step": state.step, "samples": meter.bad})


def log_metrics(
    trainer: Trainer, totals: Totals, meter: Meter, plan: EpochPlan, state: State, rate: float
) -> None:
    """Write one line of metrics, for all ranks."""
    if trainer.metrics is None:
        return
    seconds = time.monotonic() - meter.started
    values = {
        "round": state.round,
        "segment": state.segment,
        "epoch": trainer.timeline.now(state).epochs,
        **totals.means,
        "lr": rate,
        "images_per_s": totals.images / seconds,
        "waiting": (trainer.loader.waited - meter.waited_before) / seconds,
        "grad_norm": float(torch.stack(meter.norms).mean()),
    }
    trainer.metrics.record("train", state.step, **values)
    trainer.report.progress(step=state.step, done=state.offset, of=plan.steps, **values)
    if (text := trainer.watch.note(values)) is not None:
        trainer.report.event("warning", text=f"step {state.step}: {text}", about="collapse")
