"""The average of a run's last weights (SWA): what is exported and evaluated in their place.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
algorithm 1. From the epoch `train.average_from` on it is the mean, with equal weights, of the
parameters after every optimizer step. The paper takes one of each epoch. Steps need no whole epoch,
and a few hundred of them are enough for a small run. A teacher's parameters are averaged too, so
the average has whatever backbone counts. What a round renews stays as it was last, since its rows
mean other clusters in every round. So does what ranks own slices of.

Batch norms have no statistics for weights that were never trained with. So at the end they are
measured over some batches of a plan, in training mode, each batch alike. On a CPU every rank
measures its share, and the mean over the ranks counts. Training goes on from the trained weights
when a run is made longer, so both are kept: `checkpoints/STEP` and `averages/STEP`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deepclust.files import write_tensors
from deepclust.methods.base import Batch, Method, Targets
from deepclust.methods.embed import autocast
from deepclust.run.checkpoint import State, average_dir, load_average, put_weights
from deepclust.run.directory import is_done
from deepclust.world import derive

if TYPE_CHECKING:
    from deepclust.stages.train import Trainer

MOST_BATCHES = 100  # of which the statistics are measured


class Average(nn.Module):
    """Means of a method's parameters, as buffers of the method: so a checkpoint holds them."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        renewed = tuple(f"{path}." for path in method.renewed())
        self.names = [
            name for name, _ in method.named_parameters()
            if name not in method.owned() and not name.startswith(renewed)
        ]  # fmt: skip
        for name in self.names:
            self.register_buffer(_key(name), method.get_parameter(name).detach().clone())

    @torch.no_grad()
    def follow(self, method: Method, count: int) -> None:
        """Take the method's parameters in, as the last of `count` that the mean is of."""
        theirs: list[Tensor] = [method.get_parameter(name).detach() for name in self.names]
        torch._foreach_lerp_(self._means, theirs, 1 / count)

    @torch.no_grad()
    def put_into(self, method: Method) -> None:
        """Set the method's parameters to their means."""
        for name, mean in zip(self.names, self._means, strict=True):
            method.get_parameter(name).copy_(mean)

    @property
    def _means(self) -> list[Tensor]:
        return [self.get_buffer(_key(name)) for name in self.names]


def average_of(method: Method) -> Average | None:
    """Return the method's average, if the recipe wants one."""
    average = getattr(method, "average", None)
    return average if isinstance(average, Average) else None


def settle(trainer: Trainer, targets: Targets | None, state: State) -> None:
    """Put the average in place of the weights that a run ends with, and save it.

    All ranks call it. A method without an average, or one that never began, stays as it is.
    """
    method, run = trainer.method, trainer.run
    average, folder = average_of(method), average_dir(trainer.run, state.step)
    if average is None or trainer.timeline.averaged(state.step) == 0:
        return
    if trainer.world.broadcast_object(is_done(folder)):
        put_weights(method, load_average(folder, run.alive), folder, method.owned())
        return
    average.put_into(method)
    measure_statistics(trainer, targets, state)
    if trainer.world.is_first:
        weights = {n: t for n, t in method.state_dict().items() if n not in method.owned()}
        run.commit(
            folder,
            lambda partial: write_tensors(partial / "model.safetensors", weights),
            {"step": state.step},
        )


def measure_statistics(trainer: Trainer, targets: Targets | None, state: State) -> None:
    """Set the running statistics of batch norms to the mean over batches, in training mode."""
    method, config = trainer.method, trainer.recipe.train
    norms = [norm for norm in method.modules() if isinstance(norm, _NormBase)]
    if not any(norm.track_running_stats for norm in norms):
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a mean, in which all batches count alike
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
    method.train()
    for batch in _batches(trainer, targets, state):
        method.before_step(batch)
        with autocast(config.precision, trainer.world.device):
            method(batch)  # with its graph, which a term may need
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                trainer.world.all_reduce(statistic).div_(trainer.world.size)


def _batches(trainer: Trainer, targets: Targets | None, state: State) -> Iterator[Batch]:
    """Yield this rank's batches of the plan that would come next."""
    now, seed = trainer.timeline.now(state), trainer.recipe.seed
    steps = min(MOST_BATCHES, trainer.timeline.epoch_steps)
    plan = trainer.feed.plan(trainer.timeline, state, targets, steps)
    stream = trainer.loader.stream(trainer.feed.requests(plan, targets, state))
    for number, loaded in enumerate(stream):
        trainer.report.alive()
        torch.manual_seed(derive(seed, "statistics", number, trainer.world.rank))
        yield trainer.feed.to_batch(loaded, targets, state.segment, now)


def _key(name: str) -> str:
    return name.replace(".", "/")  # the name of a buffer has no dot
