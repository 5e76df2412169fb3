"""The data of the benches: a seeded hierarchical mixture, cached as .npy files with their hashes.

There is no ImageNet here, and on uniform noise inertia means nothing and pruning looks better or
worse than it is. So: 1000 classes of Zipf sizes around 30 parents, a power-law spectrum within each
class, a mean that is not zero; PCA-whitened unit rows for k-means, as DeepCluster makes them, so
that k = 10,000 splits classes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES, PARENTS, RANK, BLOCK = 1000, 30, 256, 8192


class Mixture:
    """Rows [., dim] of the mixture, block after block; the seed decides them all."""

    def __init__(self, dim: int, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.draws = torch.Generator(self.device).manual_seed(seed)
        parents = self.normal(PARENTS, dim)
        self.parent = torch.arange(CLASSES, device=self.device) % PARENTS
        self.centres = parents[self.parent] + 0.7 * self.normal(CLASSES, dim) + 0.5
        spectrum = 1 / torch.arange(1, min(RANK, dim) + 1, device=self.device)
        self.scale = (1.5 * spectrum / spectrum.sum()).sqrt()
        self.directions = self.normal(PARENTS, len(self.scale), dim)
        self.shares = 1 / torch.arange(1, CLASSES + 1, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers from our generator."""
        return torch.randn(*shape, generator=self.draws, device=self.device)

    def rows(self, count: int) -> Tensor:
        """The next rows."""
        classes = torch.multinomial(self.shares, count, True, generator=self.draws)
        inside = self.normal(count, len(self.scale)) * self.scale
        rows = self.centres[classes] + 0.1 * self.normal(count, self.centres.shape[1])
        for parent in range(PARENTS):
            own = (self.parent[classes] == parent).nonzero().flatten()
            rows[own] += inside[own] @ self.directions[parent]
        return rows


def mixture(work: Path, n: int, dim: int, dtype: str, unit: bool = False, seed: int = 0) -> Path:
    """A cached file of n raw rows; `unit`: of norm 1."""
    path = work / f"mixture-{n}x{dim}-{dtype}{'-unit' if unit else ''}-{seed}.npy"
    if not path.exists():
        drawn = Mixture(dim, seed)
        blocks = (drawn.rows(min(BLOCK, n - start)) for start in range(0, n, BLOCK))
        if unit:
            blocks = (torch.nn.functional.normalize(rows) for rows in blocks)
        write(path, (n, dim), dtype, blocks)
    return path


def whitened(work: Path, n: int, dim: int, dtype: str = "float32", seed: int = 0) -> Path:
    """A cached file of n rows as k-means gets them: whitened from twice as many dimensions."""
    path = work / f"whitened-{n}x{dim}-{dtype}-{seed}.npy"
    if not path.exists():
        from deepclust import Whitening

        raw = np.load(mixture(work, n, 2 * dim, "float32", seed=seed), mmap_mode="r")
        found = Whitening.fit(raw, dim)
        starts = range(0, n, BLOCK)
        blocks = (torch.from_numpy(found(raw[start : start + BLOCK])) for start in starts)
        write(path, (n, dim), dtype, blocks)
    return path


def write(path: Path, shape: tuple[int, int], dtype: str, blocks) -> None:
    """Write blocks of rows as one .npy; it appears under its name when it is whole."""
    print(f"making {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in blocks:
            file.write(rows.to(getattr(torch, dtype)).cpu().numpy().tobytes())
    partial.rename(path)
    torch.cuda.empty_cache()  # the contenders need the card, and this process goes on


def start_ids(work: Path, rows: Path, k: int, seed: int) -> Path:
    """A file of k row ids: the first centroids of every contender."""
    path = work / f"start-{rows.stem}-{k}-{seed}.npy"
    if not path.exists():
        n = len(np.load(rows, mmap_mode="r"))
        np.save(path, np.random.default_rng([seed, k]).choice(n, k, replace=False))
    return path


def facts(path: Path) -> dict:
    """Name, shape, dtype and hash (computed once) of a data file; the hash is printed."""
    array = np.load(path, mmap_mode="r")
    kept = path.with_suffix(".hash")
    if not kept.exists():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        kept.write_text(digest.hexdigest())
    print(f"{path.name} {kept.read_text()}", file=sys.stderr)
    shape, dtype = list(array.shape), array.dtype.name
    return {"file": path.name, "shape": shape, "dtype": dtype, "blake2b": kept.read_text()}
