"""Synthetic raw features that are never stored: any block of rows is made again from its number.

A row is max(z A + noise, 0): z comes from one of 10,000 Gaussian components (long-tailed sizes) in
64 dimensions, A [64, D] lifts it, noise has D dimensions. So rows lie near a curved manifold, are
not negative and have a mean that is not zero, as behind a ReLU. Philox is counter-based: the key is
(seed, first row of the block), so both passes of a refresh see the same bits.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from deepclust.world import generator

COMPONENTS, LATENT, INSIDE, NOISE = 10_000, 64, 0.5, 0.3
BLOCK = 4096


class Stream:
    """Rows float32 [., dim] by range of ids; `seconds`, `cpu`, `bytes`: what making them took."""

    def __init__(self, dim: int, seed: int) -> None:
        draws = generator(seed, "components")
        self.centres = draws.standard_normal((COMPONENTS, LATENT), np.float32)
        self.lift = draws.standard_normal((LATENT, dim), np.float32) / np.float32(LATENT**0.5)
        shares = 1 / np.arange(20, 20 + COMPONENTS)
        self.edges = np.cumsum(shares) / shares.sum()
        self.seed, self.seconds, self.cpu, self.bytes = seed, 0.0, 0.0, 0

    def rows(self, ids: range) -> Tensor:
        """One block; the same whenever the range starts and ends where it did."""
        began, cpu = time.perf_counter(), time.process_time()
        draws = generator(self.seed, "rows", ids.start)
        component = np.searchsorted(self.edges, draws.random(len(ids)))
        inside = draws.standard_normal((len(ids), LATENT), np.float32)
        noise = draws.standard_normal((len(ids), self.lift.shape[1]), np.float32)
        latent = torch.from_numpy(self.centres[component] + INSIDE * inside)
        rows = torch.from_numpy(noise).mul_(NOISE).addmm_(latent, torch.from_numpy(self.lift))
        rows.relu_()
        self.bytes += rows.nbytes
        self.cpu += time.process_time() - cpu
        self.seconds += time.perf_counter() - began
        return rows
