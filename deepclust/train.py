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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from deepclust.checkpoint import State
from deepclust.data.index import Index
from deepclust.data.plan import EpochPlan
from deepclust.data.reader import Loaded, Loader, Request
from deepclust.data.views import RandomResizedCrop, to_float
from deepclust.errors import DataError, NumericalError, RequeueWanted
from deepclust.files import write_json
from deepclust.methods.base import Batch, Method, Targets
from deepclust.metrics import Metrics, Report
from deepclust.optim import Optimizers, Schedule
from deepclust.recipe import Data, TrainSection
from deepclust.world import World, derive


@dataclass
class Trainer:
    """The parts that training needs; `model` is the method, wrapped in DDP when there are ranks."""

    world: World
    index: Index
    loader: Loader
    method: Method
    model: torch.nn.Module
    optimizers: Optimizers
    schedule: Schedule
    data: Data
    config: TrainSection
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

    loss: Tensor | float = 0.0
    steps: int = 0
    images: int = 0
    bad: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0


def train_segment(
    trainer: Trainer, plan: EpochPlan, targets: Targets, assignments: Path, state: State
) -> State:
    """Train from `state.offset` to the end of the plan; returns the state after it.

    Raises NumericalError on a loss that is not finite, RequeueWanted when asked to stop.
    """
    trainer.model.train()
    trainer.meter = Meter(waited=trainer.loader.waited)
    parts = trainer.loader.stream(_requests(trainer, plan, assignments, state))
    for _ in range(state.offset, plan.steps):
        torch.manual_seed(derive(trainer.seed, "step", state.step, trainer.world.rank))
        rate = trainer.optimizers.set_rate(trainer.schedule.factor(state.samples))
        for part in range(trainer.config.accumulate):
            last = part == trainer.config.accumulate - 1
            _accumulate(trainer, next(parts), targets, sync=last)
        trainer.optimizers.step()
        state = state.after_step(trainer.config.batch)
        at_end = state.offset == plan.steps
        asked = trainer.world.size == 1 and trainer.stopping()
        if state.step % trainer.config.log == 0 or at_end or asked or trainer.save_due(state):
            _check_and_tell(trainer, state, plan, rate)
            if trainer.save_due(state) and not at_end:
                trainer.save(state)
    return state


def _requests(
    trainer: Trainer, plan: EpochPlan, assignments: Path, state: State
) -> Iterator[Request]:
    """This rank's reads, from the step where we are: a slice of the plan."""
    world, parts = trainer.world, trainer.config.accumulate
    ids = plan.for_rank(world.rank, world.size, state.offset)
    share = ids.shape[1]
    data = trainer.data
    view = RandomResizedCrop(data.size, data.crop_scale, data.crop_ratio, data.flip)
    key = derive(trainer.seed, "view", state.segment)
    for row, step in enumerate(range(state.offset, plan.steps)):
        first = step * trainer.config.batch + world.rank * share
        positions = np.arange(first, first + share)
        for mine, where in zip(np.split(ids[row], parts), np.split(positions, parts), strict=True):
            yield Request(ids=mine, positions=where, key=key, view=view, assignments=assignments)


def _accumulate(trainer: Trainer, loaded: Loaded, targets: Targets, sync: bool) -> None:
    """Forward and backward of one part; gradients meet over the ranks at the last one."""
    batch = _to_device(trainer, loaded, targets)
    with _no_sync(trainer.model, sync), autocast(trainer):
        loss = trainer.model(batch)["loss"]
        (loss / trainer.config.accumulate).backward()
    trainer.meter.loss = trainer.meter.loss + loss.detach()
    trainer.meter.steps += 1
    trainer.meter.images += len(loaded.ids)
    trainer.meter.bad += [bad.reason for bad in loaded.bad]


def _to_device(trainer: Trainer, loaded: Loaded, targets: Targets) -> Batch:
    device = trainer.world.device
    images = to_float(
        loaded.images.to(device, non_blocking=True), trainer.data.mean, trainer.data.std
    )
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(targets.ids[:, loaded.ids].astype(np.int64)).to(device)
    return Batch(torch.from_numpy(np.asarray(loaded.ids)), images, labels)


def _no_sync(model: torch.nn.Module, sync: bool) -> contextlib.AbstractContextManager[None]:
    if sync or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def autocast(trainer: Trainer) -> torch.autocast:
    """bf16 on a GPU unless the recipe says otherwise; fp32 on a CPU unless it asks."""
    wanted = trainer.config.precision
    on = wanted == "bf16" or (wanted == "auto" and trainer.world.device.type == "cuda")
    return torch.autocast(trainer.world.device.type, torch.bfloat16, enabled=on)


def _check_and_tell(trainer: Trainer, state: State, plan: EpochPlan, rate: float) -> None:
    """Agree over the ranks: is the loss finite, are we asked to stop; then write the metrics."""
    meter, world = trainer.meter, trainer.world
    facts = torch.tensor(
        [float(meter.loss), meter.steps, meter.images, len(meter.bad), trainer.stopping()],
        dtype=torch.float64,
    )
    loss, steps, images, bad, stop = world.sum(facts.to(world.device)).tolist()
    first = state.step - meter.steps // trainer.config.accumulate
    if not math.isfinite(loss):
        _fail_on_nan(trainer, plan, first, state)
    _check_bad(trainer, int(bad), state)
    _tell(trainer, state, plan, rate, loss / steps, images)
    trainer.meter = Meter(waited=trainer.loader.waited)
    if stop:
        trainer.save(state)
        world.barrier()  # nobody leaves before rank 0 has written
        raise RequeueWanted(f"stopped at step {state.step}, as asked; resume continues from there")


def _tell(
    trainer: Trainer, state: State, plan: EpochPlan, rate: float, loss: float, images: float
) -> None:
    seconds = time.monotonic() - trainer.meter.started
    values = {
        "round": state.round,
        "segment": state.segment,
        "epoch": state.samples / trainer.schedule.epoch,
        "loss": loss,
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
    raise NumericalError(
        f"the loss is not finite in steps {first + 1} to {state.step} (round {state.round}). "
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
    if bad > max(1.0, trainer.data.max_bad * seen):
        listed = "\n".join(f"  {line}" for line in trainer.meter.bad[:20])
        raise DataError(
            f"{bad} of the last {seen} samples could not be read, more than data.max_bad="
            f"{trainer.data.max_bad} allows:\n{listed}\nRepair the shards and resume."
        )
