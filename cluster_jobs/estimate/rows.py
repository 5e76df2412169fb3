"""Seconds that a row takes in a round on this machine: k-means at the recipe's k, and projection.

A short run has too few images for the recipe's k. So the clustering is timed apart, on drawn rows
of the same width: its time depends on their number, not on what they are.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from deepclust.clustering.kmeans import kmeans
from deepclust.recipe import Recipe
from deepclust.world import generator

MOST = 20_000  # rows; more are in proportion
PROJECTED = 8192
FEW, MORE = 1, 5  # iterations: what a k-means takes beside them is not multiplied


def seconds_of_a_row(recipe: Recipe, samples: int, width: int, dim: int) -> float:
    """Return the seconds of a row in one round: `width` numbers as extracted, `dim` clustered."""
    refresh = recipe.method.round
    if recipe.cluster is None or refresh is None:
        return 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.train.threads or threads)
    try:
        rows = _drawn(recipe.seed, min(samples, MOST), dim)
        clustered = sum(_kmeans(recipe, part, k) * times for part, k, times in _parts(recipe, rows))
        return clustered / len(rows) + (_projection(recipe, width, dim) if refresh.whiten else 0.0)
    finally:
        torch.set_num_threads(threads)


def _parts(recipe: Recipe, rows: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
    """Return the k-means of a round: rows, clusters, and how often."""
    cluster, refresh = recipe.clustering, recipe.method.round
    assert refresh is not None
    if refresh.kind != "k-means":  # one pass over scores, which the short run has measured
        return []
    if cluster.supers == 1:
        return [(rows, cluster.k, refresh.heads)]
    inner = rows[: len(rows) // cluster.supers]
    return [(rows, cluster.supers, 1), (inner, cluster.k // cluster.supers, cluster.supers)]


def _kmeans(recipe: Recipe, rows: np.ndarray, k: int) -> float:
    """Return the seconds of a k-means of all iterations."""
    cluster, refresh = recipe.clustering, recipe.method.round
    spherical = refresh is not None and refresh.spherical
    k = min(k, max(1, len(rows) // 2))

    def timed(iterations: int, rows: np.ndarray = rows) -> float:
        began = time.perf_counter()
        kmeans(rows, k, iterations=iterations, spherical=spherical, backend=cluster.backend)
        return time.perf_counter() - began

    timed(1, rows[: 2 * k])  # what is made once
    few, more = timed(FEW), timed(MORE)
    return few + max(0.0, more - few) / (MORE - FEW) * (cluster.iterations - FEW)


def _projection(recipe: Recipe, width: int, dim: int) -> float:
    """Return the seconds of a row's projection: a product of its width and cluster.dim."""
    rows = torch.from_numpy(_drawn(recipe.seed, PROJECTED, width)).float()
    matrix = torch.ones(width, dim)
    began = time.perf_counter()
    torch.nn.functional.normalize(rows @ matrix)
    return (time.perf_counter() - began) / PROJECTED


def _drawn(seed: int, count: int, width: int) -> np.ndarray:
    """Return rows of length 1."""
    rows = generator(seed, "estimate", count).standard_normal((count, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)
