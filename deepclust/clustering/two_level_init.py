"""A start for flat k-means with many clusters: k-means in two levels on a sample of the rows.

With so many clusters that twenty passes over all centroids are too many, a few passes from this
start come close. With k = m * m the two levels compare a row with 2 m centroids instead of k.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32, Int64

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.init import distinct_rows
from deepclust.clustering.kmeans import solve_kmeans
from deepclust.clustering.options import Given, KMeansOptions
from deepclust.errors import DataError
from deepclust.world import derive, generator

SAMPLE = 64  # rows per cluster that a start looks at
START_ITERATIONS = 10


def given_start(points: ArrayPoints, options: KMeansOptions) -> Given:
    """Return the centroids of `init="two-level"`.

    There are none for a start that `kmeans` draws.
    """
    if options.init != "two-level":
        return Given()
    return Given(two_level_start(points, options.k, options.seed))


def two_level_start(points: ArrayPoints, k: int, seed: int = 0) -> Float32[np.ndarray, "k d"]:
    """Return centroids for flat k-means: about sqrt(k) super-clusters, each split by its size.

    At most 64 rows a cluster are used. Where a super-cluster has fewer distinct rows than its
    share, random distinct rows are used instead. A few full passes should follow.
    """
    draws = generator(seed, "kmeans", "two-level")
    size = min(points.n, SAMPLE * k)
    sample = points.select(np.sort(draws.choice(points.n, size, replace=False, shuffle=False)))
    m = max(1, round(k**0.5))
    options = KMeansOptions(m, START_ITERATIONS, derive(seed, "supers"))
    try:
        supers = solve_kmeans(sample, options).assignments
    except DataError:  # duplicates: fewer distinct rows than super-clusters
        supers = np.zeros(size, np.int32)
    shares = _shares(np.bincount(supers, minlength=m), k)
    parts = [np.zeros((0, points.dim), np.float32)]
    for s in np.flatnonzero(shares):
        inside = sample.select(np.flatnonzero(supers == s))
        own = replace(options, k=int(shares[s]), seed=derive(seed, "sub", int(s)))
        try:
            parts.append(solve_kmeans(inside, own).centroids)
        except DataError:  # duplicates: fewer distinct rows than its share
            continue
    centroids = torch.from_numpy(np.concatenate(parts)).to(points.device)
    rest = distinct_rows(points, k - len(centroids), centroids, 0, seed)
    return torch.cat([centroids, rest]).cpu().numpy()


def _shares(sizes: Int64[np.ndarray, " m"], k: int) -> Int64[np.ndarray, " m"]:
    """Share k clusters out by size (largest remainders), to none more than it has rows."""
    exact = k * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: k - int(shares.sum())]] += 1
    least: Int64[np.ndarray, " m"] = np.minimum(shares, sizes)
    return least
