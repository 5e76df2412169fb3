"""Training on the pseudo-labels of one round: the one visible loop.

The plan says which samples form each global batch; this rank takes its share, in `accumulate`
parts. Batches, views and dropout depend on (seed, step, rank) alone, so a run that was killed
and resumed walks the same path, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from deepclust.data.plan import EpochPlan
from deepclust.data.read.loader import Bad, Loader
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, NumericalError, RequeueWanted
from deepclust.files import write_json
from deepclust.methods import embed
from deepclust.methods.base import Batch, Method, Now, Targets
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe.sections import TrainSection
from deepclust.run.checkpoint import State
from deepclust.run.reporting import Metrics, Report
from deepclust.stages.batches import Feed
from deepclust.world import World, derive


@dataclass
class Trainer:
    """The parts that training needs; `model` is the method, wrapped in DDP when there are ranks."""

    world: World
    index: Index
    loader: Loader
    feed: Feed
    method: Method
    model: torch.nn.Module
    optimizers: Optimizers
    epoch_samples: int
    config: TrainSection
    max_bad: float
    seed: int
    folder: Path
    metrics: Metrics | None
    report: Report
    save: Callable[[State], None]
    save_due: Callable[[State], bool]
    stopping: Callable[[], bool]
    meter: Meter = field(default_factory=lambda: Meter())


@dataclass
class Meter:
    """Sums since the last line of metrics."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    bad: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0


def train_segment(
    trainer: Trainer,
    plan: EpochPlan,
    targets: Targets | None,
    state: State,
) -> State:
    """Train from `state.offset` to the end of the plan; returns the state after it.

    `targets` are None for a method that trains on no clustering.

    Raises NumericalError on a loss that is not finite, RequeueWanted when asked to stop.
    """
    trainer.model.train()
    trainer.meter = Meter(waited=trainer.loader.waited)
    feed = trainer.feed
    parts = trainer.loader.stream(feed.requests(plan, targets, state))
    for _ in range(state.offset, plan.steps):
        torch.manual_seed(derive(trainer.seed, "step", state.step, trainer.world.rank))
        epochs = state.samples / trainer.epoch_samples
        now = Now(state.step, epochs, epochs / trainer.config.epochs)
        rate = trainer.optimizers.set_schedule(now)
        for part in range(trainer.config.accumulate):
            last = part == trainer.config.accumulate - 1
            loaded = next(parts)
            trainer.report.alive()
            _accumulate(trainer, feed.to_batch(loaded, targets, state.segment), loaded.bad, last)
        trainer.optimizers.step()
        state = state.after_step(trainer.config.batch)
        at_end = state.offset == plan.steps
        asked = trainer.world.size == 1 and trainer.stopping()
        if state.step % trainer.config.log == 0 or at_end or asked or trainer.save_due(state):
            _check_and_tell(trainer, state, plan, rate)
            if trainer.save_due(state) and not at_end:
                trainer.save(state)
    return state


def _accumulate(trainer: Trainer, batch: Batch, bad: list[Bad], sync: bool) -> None:
    """Forward and backward of one part; gradients meet over the ranks at the last one."""
    meter = trainer.meter
    with _no_sync(trainer.model, sync), autocast(trainer):
        losses = trainer.model(batch)
        (losses["loss"] / trainer.config.accumulate).backward()
    for name, value in losses.items():
        meter.losses[name] = meter.losses.get(name, 0.0) + value.detach()
    meter.steps += 1
    meter.images += len(batch.ids)
    meter.bad += [one.reason for one in bad]


def _no_sync(model: torch.nn.Module, sync: bool) -> contextlib.AbstractContextManager[None]:
    if sync or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def autocast(trainer: Trainer) -> torch.autocast:
    """Return the autocast context that embedding has too."""
    return embed.autocast(trainer.config.precision, trainer.world.device)


def _check_and_tell(trainer: Trainer, state: State, plan: EpochPlan, rate: float) -> None:
    """Agree over the ranks: is the loss finite, are we asked to stop; then write the metrics."""
    meter, world = trainer.meter, trainer.world
    facts = torch.tensor(
        [
            meter.steps,
            meter.images,
            len(meter.bad),
            trainer.stopping(),
            *map(float, meter.losses.values()),
        ],
        dtype=torch.float64,
    )
    steps, images, bad, stop, *sums = world.all_reduce(facts.to(world.device)).tolist()
    losses = {name: total / steps for name, total in zip(meter.losses, sums, strict=True)}
    first = state.step - meter.steps // trainer.config.accumulate
    if not math.isfinite(losses["loss"]):
        _fail_on_nan(trainer, plan, first, state)
    _check_bad(trainer, int(bad), state)
    _tell(trainer, state, plan, rate, losses, images)
    trainer.meter = Meter(waited=trainer.loader.waited)
    if stop:
        trainer.save(state)
        world.barrier()  # nobody leaves before rank 0 has written
        raise RequeueWanted(f"stopped at step {state.step}, as asked; resume continues from there")


def _tell(
    trainer: Trainer,
    state: State,
    plan: EpochPlan,
    rate: float,
    losses: dict[str, float],
    images: float,
) -> None:
    seconds = time.monotonic() - trainer.meter.started
    values = {
        "round": state.round,
        "segment": state.segment,
        "epoch": state.samples / trainer.epoch_samples,
        **losses,
        "lr": rate,
        "images_per_s": images / seconds,
        "waiting": (trainer.loader.waited - trainer.meter.waited) / seconds,
    }
    if trainer.metrics is not None:  # rank 0 speaks for all
        trainer.metrics.record("train", state.step, **values)
        done, of = state.offset, plan.steps
        trainer.report.progress(step=state.step, done=done, of=of, **values)


def _fail_on_nan(trainer: Trainer, plan: EpochPlan, first: int, state: State) -> None:
    if trainer.world.is_first:
        begin = state.offset - (state.step - first)
        ids = plan.ids.reshape(plan.steps, -1)[begin : state.offset]
        write_json(trainer.folder / "nan-batch.json", {"step": first, "ids": ids.tolist()})
    of_round = "" if state.round < 0 else f" (round {state.round})"
    raise NumericalError(
        f"the loss is not finite in steps {first + 1} to {state.step}{of_round}. "
        f"Their sample ids are in {trainer.folder / 'nan-batch.json'}. The last checkpoint is "
        "sound: lower train.lr in a new run that starts from it (init.weights), or look at those "
        "images."
    )


def _check_bad(trainer: Trainer, bad: int, state: State) -> None:
    """Unreadable samples are replaced one by one, but not without end."""
    if not bad:
        return
    if trainer.world.is_first:
        trainer.report.event("replaced", step=state.step, count=bad, first=trainer.meter.bad[:5])
    with open(trainer.folder / "logs" / "replaced.jsonl", "a") as file:
        file.write(json.dumps({"step": state.step, "samples": trainer.meter.bad}) + "\n")
    seen = trainer.config.log * trainer.config.batch
    if bad > max(1.0, trainer.max_bad * seen):
        listed = "\n".join(f"  {line}" for line in trainer.meter.bad[:20])
        raise DataError(
            f"{bad} of the last {seen} samples could not be read, more than data.max_bad="
            f"{trainer.max_bad} allows:\n{listed}\nRepair the shards and resume."
        )
