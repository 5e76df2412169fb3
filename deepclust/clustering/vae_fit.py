"""Training of a VAE on any number of stored rows, which can be stopped at any time and continued.

Rows are read from a memory map in groups of contiguous blocks. An epoch's blocks are in a random
order, and so are the rows of a group. Both depend on (seed, number, epoch, group) alone, as does
the noise of the latents. What is kept between groups is weights, Adam's moments and two integers.
So a training that was stopped and continued ends with the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deepclust.clustering.precision import full_precision
from deepclust.clustering.vae import ACTIVE, Vae, VaeOptions, blocks, scaling
from deepclust.errors import DataError, NumericalError
from deepclust.files import atomic_file, reading, write_tensors
from deepclust.world import derive, generator

GROUP = 2**24  # numbers of a group of rows, which is what is in memory
BLOCKS = 16  # of a group
MEASURES = ("bound", "reconstruction", "divergence")  # of an epoch: means over its rows


@dataclass
class Fit:
    """A VAE in training: groups that are done are those before (epoch, group)."""

    vae: Vae
    optimizer: torch.optim.Adam
    epoch: int = 0
    group: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * (len(MEASURES) + 1))  # and the rows
    history: list[dict[str, float]] = field(default_factory=list)  # of the epochs that are done

    def save(self, path: Path) -> None:
        """Write all that goes on, atomically."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"adam.{i}.{k}": v for i, one in state.items() for k, v in one.items()}
        weights = {f"vae.{name}": value for name, value in self.vae.state_dict().items()}
        place = {"epoch": self.epoch, "group": self.group}
        facts = {**place, "sums": self.sums, "history": self.history}
        with atomic_file(path) as partial:
            write_tensors(partial, {**weights, **moments}, {"fit": json.dumps(facts)})

    def load(self, path: Path) -> None:
        """Take up what `save` wrote, or raise `DataError`."""
        with reading(path, "Delete it to train this VAE from the start."):
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["fit"])
            tensors = load_file(path)
            self.vae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("vae.")})
            state: dict[int, dict[str, Tensor]] = {}
            for key in tensors:
                if key.startswith("adam."):
                    _, number, name = key.split(".")
                    state.setdefault(int(number), {})[name] = tensors[key]
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.epoch, self.group = int(facts["epoch"]), int(facts["group"])
            self.sums, self.history = facts["sums"], facts["history"]


def fit_vae(
    rows: np.ndarray,
    options: VaeOptions,
    number: int = 0,
    *,
    state: Path | None = None,
    device: torch.device | None = None,
    alive: Callable[[Fit], bool] = lambda fit: False,
) -> tuple[Vae, list[dict[str, float]]]:
    """Return the VAE of rows [n, D] in eval mode, and the measures of each epoch.

    `number` tells the VAEs of an ensemble apart. `state` is a file to continue from, if it is
    there. After every group `alive` is given the training, and says whether to save it there.

    Raises `NumericalError` for rows that are not finite or all equal, and where nothing is learned,
    and `DataError` for fewer rows than a batch.
    """
    if len(rows) < options.batch:
        raise DataError(
            f"{len(rows)} rows are fewer than one batch of {options.batch}: set --batch to at most "
            f"{len(rows)}"
        )
    options = options.of_rows(len(rows))
    fit = _begin(rows, options, number, device or torch.device("cpu"))
    if state is not None and state.exists():
        fit.load(state)
    with full_precision():
        for batches in _groups(rows, fit, options, number):
            _train(fit, batches, options, number)
            _advance(fit, _group_count(rows, options))
            if alive(fit) and state is not None:
                fit.save(state)
        vae = fit.vae.eval()
        _standardise(vae, rows)
    return vae, fit.history


def _begin(rows: np.ndarray, options: VaeOptions, number: int, device: torch.device) -> Fit:
    """Return an untrained VAE that knows the scale of the rows."""
    mean, scale = scaling(rows)
    seed = derive(options.seed, "vae", number)
    vae = Vae(rows.shape[1], options.latent, options.hidden, seed=seed)
    vae.mean.copy_(torch.from_numpy(mean))
    vae.scale.fill_(scale)
    vae = vae.to(device).train()
    return Fit(vae, torch.optim.Adam(vae.parameters(), lr=options.lr))


def _block_rows(rows: np.ndarray, options: VaeOptions) -> int:
    """Return the rows of a block: a group has two batches at least, so every epoch has a step."""
    n, width = len(rows), int(rows.shape[1])
    return -(-min(n, max(2 * options.batch, GROUP // width)) // BLOCKS)


def _group_count(rows: np.ndarray, options: VaeOptions) -> int:
    """Return the groups of an epoch."""
    return -(-len(rows) // (_block_rows(rows, options) * BLOCKS))


def _groups(
    rows: np.ndarray, fit: Fit, options: VaeOptions, number: int
) -> Iterator[Float32[Tensor, "m D"]]:
    """Yield the prepared rows of each group that is left, in a random order."""
    size = _block_rows(rows, options)
    while fit.epoch < options.epochs:
        epoch = fit.epoch
        order = generator(options.seed, "vae-blocks", number, epoch)
        chosen = order.permutation(-(-len(rows) // size))
        while fit.epoch == epoch:  # the caller counts
            mine = chosen[fit.group * BLOCKS : (fit.group + 1) * BLOCKS].tolist()
            parts = [fit.vae.prepared(np.asarray(rows[i * size : (i + 1) * size])) for i in mine]
            together = torch.cat(parts)
            shuffled = generator(options.seed, "vae-rows", number, epoch, fit.group)
            places = torch.from_numpy(shuffled.permutation(len(together)))
            yield together[places.to(together.device)]


def _train(fit: Fit, rows: Float32[Tensor, "m D"], options: VaeOptions, number: int) -> None:
    """Take a step for every whole batch of a group.

    The rest is left out, and is another one in every epoch. Raises `NumericalError` when the loss
    is not finite.
    """
    noise = torch.Generator().manual_seed(
        derive(options.seed, "vae-noise", number, fit.epoch, fit.group)
    )
    sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=rows.device)
    steps = len(rows) // options.batch
    for step in range(steps):
        x = rows[step * options.batch : (step + 1) * options.batch]
        epsilon = torch.randn(len(x), options.latent, generator=noise).to(x.device)
        reconstruction, kl = fit.vae.bound(x, epsilon)
        loss = (reconstruction + options.beta * kl).mean()
        fit.optimizer.zero_grad()
        torch.autograd.backward(loss)
        fit.optimizer.step()
        sums += torch.stack([loss, reconstruction.mean(), kl.mean()]).detach().double()
    added = [*(sums * options.batch).tolist(), steps * options.batch]
    fit.sums = [old + new for old, new in zip(fit.sums, added, strict=True)]
    if not all(map(math.isfinite, fit.sums)):
        raise NumericalError(
            f"the loss of VAE {number} is not finite in epoch {fit.epoch + 1}: set a lower --lr"
        )


def _advance(fit: Fit, groups: int) -> None:
    """Count a group, and at the end of an epoch note its measures."""
    fit.group += 1
    if fit.group == groups:
        *sums, count = fit.sums
        means = {name: total / count for name, total in zip(MEASURES, sums, strict=True)}
        fit.history.append({**means, "noise": float(fit.vae.noise.detach())})
        fit.epoch, fit.group, fit.sums = fit.epoch + 1, 0, [0.0] * len(fit.sums)


@torch.inference_mode()
def _standardise(vae: Vae, rows: np.ndarray) -> None:
    """Measure mean and deviation of the latent means, in float64, in one pass over the rows.

    Raises `NumericalError` when no latent moves with the rows.
    """
    total, squares = torch.zeros_like(vae.latent_mean), torch.zeros_like(vae.latent_mean)
    for _, block in blocks(rows):
        mu = vae.encode(vae.prepared(block))[0].double()
        total += mu.sum(0)
        squares += mu.square().sum(0)
    mean = total / len(rows)
    variance = (squares / len(rows) - mean.square()).clamp(min=0)
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_(torch.where(variance > ACTIVE, variance.sqrt(), 0.0))
    if vae.active == 0:
        raise NumericalError(
            "no latent of the VAE says anything of its row (all collapsed to the prior): set a "
            "lower --beta, or more --epochs"
        )
