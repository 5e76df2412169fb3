"""A variational autoencoder on stored features: its latent means are better to cluster than they.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, eq. 7 and 10, on the features of a
pretrained network, as in Alfano et al. 2022 (arXiv 2209.06726), who put several of them side by
side, one for each network.

    -ELBO = |x - g(z)|^2 / (2 s^2) + D / 2 log(2 pi s^2) + beta KL(N(mu, sigma^2) || N(0, 1))

The noise s^2 is one learned number, so that beta = 1 is the bound itself and needs no tuning to the
scale of the features. Rows are centred and divided by one number first, the root of their mean
variance. `hidden=0` leaves both nonlinear layers out: it is then probabilistic PCA (Lucas et al.,
"Don't Blame the ELBO!", NeurIPS 2019). Latents whose mean does not move with the row say nothing
(Burda et al., ICLR 2016, section 4.1.1). They become columns of zeros, not noise of variance 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from deepclust.clustering.points import not_finite
from deepclust.clustering.precision import full_precision
from deepclust.errors import DataError, NumericalError, RecipeError
from deepclust.files import atomic_file, reading, write_tensors
from deepclust.world import derive

BLOCK = 2**22  # numbers that are read at a time
LEAST_NOISE = 1e-5  # of s^2, where the mean variance of the features is 1
MOST_LOG_VARIANCE = 14.0  # of a latent, either way
EPOCHS, STEPS = 10, 3000  # of a training whose length is not chosen
ACTIVE = 0.01  # variance of a latent's mean over the rows, of those that say something


@dataclass(frozen=True)
class VaeOptions:
    """The network and its training."""

    latent: int = 32
    hidden: int = 128  # 0: linear
    beta: float = 1.0
    epochs: int = 0  # 0: those that STEPS steps take, and EPOCHS at least
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `RecipeError` for a value that cannot be trained with."""
        least = {"latent": 1, "hidden": 0, "epochs": 0, "batch": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(f"--{name} {getattr(self, name)}: give {low} or more")
        for name in ("beta", "lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name == "lr" and value == 0):
                raise RecipeError(f"--{name} {value}: give a positive number")

    def of_rows(self, n: int) -> VaeOptions:
        """Return the options with the number of epochs that n rows take."""
        steps = max(1, n // self.batch)
        return replace(self, epochs=self.epochs or max(EPOCHS, -(-STEPS // steps)))


class Vae(nn.Module):
    """Features [b, D] to latent means, and back."""

    mean: Tensor
    scale: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, width: int, latent: int, hidden: int, *, seed: int = 0) -> None:
        """Draw the weights from the seed alone."""
        super().__init__()
        inside = hidden or width
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "weights"))
            self.encoder = _layer(width, hidden)
            self.mu = nn.Linear(inside, latent)
            self.log_variance = nn.Linear(inside, latent)
            self.decoder = _layer(latent, hidden)
            self.back = nn.Linear(hidden or latent, width)
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("latent_mean", torch.zeros(latent, dtype=torch.float64))
        self.register_buffer("latent_std", torch.zeros(latent, dtype=torch.float64))

    def prepared(self, rows: np.ndarray) -> Float32[Tensor, "m D"]:
        """Return stored rows centred and scaled, on the network's device."""
        wide = torch.from_numpy(rows.astype(np.float64)).to(self.mean.device)
        return ((wide - self.mean) * self.scale).float()

    def encode(self, x: Float[Tensor, "b D"]) -> tuple[Float[Tensor, "b L"], Float[Tensor, "b L"]]:
        """Return mean and log of the variance of the latents of prepared rows."""
        inside = self.encoder(x)
        limit = MOST_LOG_VARIANCE
        return self.mu(inside), self.log_variance(inside).clamp(-limit, limit)

    def decode(self, z: Float[Tensor, "b L"]) -> Float[Tensor, "b D"]:
        """Return the prepared rows that latents stand for."""
        rows: Tensor = self.back(self.decoder(z))
        return rows

    @property
    def noise(self) -> Float[Tensor, ""]:
        """The variance s^2 of a prepared row about its decoding."""
        return self.log_noise.exp().clamp(min=LEAST_NOISE)

    def bound(
        self, x: Float[Tensor, "b D"], epsilon: Float[Tensor, "b L"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return both parts of -ELBO of prepared rows, beta aside: the reconstruction, the KL."""
        mu, log_variance = self.encode(x)
        missed = (x - self.decode(mu + (0.5 * log_variance).exp() * epsilon)).square().sum(1)
        noise = self.noise
        constant = 0.5 * x.shape[1] * (2 * math.pi * noise).log()
        return missed / (2 * noise) + constant, divergence(mu, log_variance)

    @torch.inference_mode()
    def features(self, rows: np.ndarray) -> Float32[np.ndarray, "m L"]:
        """Return the features of stored rows: latent means, standardised over the fitted rows."""
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise DataError(
                f"the VAE was fitted on {len(self.mean)} columns, and these rows have shape "
                f"{tuple(rows.shape)}. Give features of the same network."
            )
        with full_precision():
            mu = self.encode(self.prepared(rows))[0].double()
        moves = self.latent_std > 0
        standard = (mu - self.latent_mean) / torch.where(moves, self.latent_std, 1.0)
        return np.asarray(torch.where(moves, standard, 0.0).float().cpu().numpy())

    @property
    def active(self) -> int:
        """The number of latents whose mean moves with the row."""
        return int((self.latent_std > 0).sum())

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        latent, width = self.mu.weight.shape
        hidden = 0 if isinstance(self.encoder, nn.Identity) else width
        with atomic_file(path) as partial:
            # one entry: safetensors has no order of several, and equal VAEs are equal files
            shape = json.dumps([len(self.mean), latent, hidden])
            write_tensors(partial, self.state_dict(), {"shape": shape})

    @classmethod
    def load(cls, path: Path) -> Vae:
        """Read what `save` wrote, or raise `DataError`."""
        with reading(path):
            with safe_open(path, "pt") as file:
                width, latent, hidden = json.loads(file.metadata()["shape"])
            vae = cls(width, latent, hidden)
            vae.load_state_dict(load_file(path))
        return vae.eval()


def divergence(mu: Float[Tensor, "b L"], log_variance: Float[Tensor, "b L"]) -> Float[Tensor, " b"]:
    """Return KL(N(mu, sigma^2) || N(0, 1)) of every row (Kingma and Welling, appendix B)."""
    return 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(1)


def _layer(before: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, hidden), nn.ReLU()) if hidden else nn.Identity()


def blocks(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield rows [n, D] block by block, each with the number of its first row."""
    size = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), size):
        yield start, np.asarray(rows[start : start + size])


def scaling(rows: np.ndarray) -> tuple[Float64[np.ndarray, " D"], float]:
    """Return the mean of rows [n, D] and 1 / the root of their mean variance, in float64.

    Raises `NumericalError` for rows that are not finite (named), constant, or too large to square.
    """
    _check_finite(rows)
    pivot = rows[0].astype(np.float64)  # equal rows have a spread of 0 about it, without rounding
    total, squares = np.zeros(rows.shape[1]), 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for _, block in blocks(rows):
            away = block.astype(np.float64) - pivot
            total += away.sum(0)
            squares += float(np.square(away).sum())
        offset = total / len(rows)
        spread = squares / len(rows) - float(np.square(offset).sum())
    if not np.isfinite(spread):
        raise NumericalError("the values are too large to be squared. Divide them by a constant.")
    if spread <= 0:
        raise NumericalError(
            f"all {len(rows)} rows are equal: there is nothing to learn. Look at the network that "
            "made them."
        )
    return pivot + offset, float((spread / rows.shape[1]) ** -0.5)


def _check_finite(rows: np.ndarray) -> None:
    """Raise `NumericalError` naming the first rows that hold NaN or infinity."""
    first: list[int] = []
    count = 0
    for start, block in blocks(rows):
        bad = start + np.flatnonzero(~np.isfinite(block).all(1))
        first, count = [*first, *bad[:5].tolist()][:5], count + len(bad)
    if count:
        raise NumericalError(not_finite(np.array(first), count, len(rows)))
