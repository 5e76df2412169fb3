"""One round's labels from the method's own heads, balanced over all samples: Self-Labelling.

Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation learning",
ICLR 2020, eq. 5 to 7. Each head gives p(y | x) of every sample. Its labels maximise sum log p under
the constraint that all k clusters are equally large, relaxed by an entropy of weight 1 / lambda:
Q = diag(u) P^lambda diag(v), computed by Sinkhorn and Knopp's iteration. A sample's label is the
largest entry of its row, so that sizes are only nearly equal. Round 0 has random clusters of equal
size.

The reference implementation is yukimasano/self-label. It differs in three things. Its rows come
from augmented images and a network in training mode. Ours come from centre crops in evaluation
mode, so that they do not depend on who reads what. It scales n x k numbers of float64 (31 GB for
1.28M x 3000). Here only the features and k scalings are kept, and scores are computed tile by tile
in every iteration. It stops when the rows' scalings change by less than 0.1 in sum, here when the
largest deviation of a cluster's mass is below 1 %.

Let n be the samples, D the width of the features, k the clusters, H the heads, and W the ranks that
cluster. features/rows.npy has 2 n D bytes. On a GPU a rank holds its 2 n D / W, on a CPU they stay
memory-mapped. A head's weights take 4 k D bytes. A tile of 2^21 scores takes 24 bytes a score while
it is worked on, 50 MB. An iteration takes 2 n D k / W operations for each head. With D = 2048:
1.28M samples are 5.2 GB, 100M 410 GB, 6.4 GB each on 64 ranks. Scores of up to 256 MiB a rank are
kept instead of computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deepclust.clustering.options import Progress
from deepclust.clustering.precision import full_precision
from deepclust.clustering.sinkhorn import Balance, balance
from deepclust.stages.round_kmeans import RoundClusters, RoundTask, spread
from deepclust.world import generator

ITERATIONS = 300
TOLERANCE = 0.01  # of a cluster's mass, relative
CELLS = 2**21  # scores of a tile
KEPT = 2**26  # scores that a rank keeps


def label_round(task: RoundTask) -> tuple[list[RoundClusters], float]:
    """Label all samples once for each head, and return the clusters, and the seconds of reading.

    Without a scorer, as in round 0, labels are drawn. Called by all ranks of `task.world`, which
    all return the same.
    """
    heads = range(len(task.random_seeds))
    if task.scorer is None:
        return [_drawn(task, head) for head in heads], 0.0
    started = time.monotonic()
    tiles = _own_tiles(task)
    read_s = time.monotonic() - started
    return [_label_head(task, head, tiles) for head in heads], read_s


def _drawn(task: RoundTask, head: int) -> RoundClusters:
    """Return random clusters of equal size, or one sample more, from the head's seed."""
    k, n = task.config.k, len(task.rows)
    order = generator(task.random_seeds[head], "balanced").permutation(len(task.valid))
    assignments = np.full(n, -1, np.int32)
    assignments[task.valid[order]] = np.arange(len(order)) % k
    distances = np.full(n, np.nan, np.float32)
    distances[task.valid] = np.log(k)
    return _clusters(task, assignments, distances, 0, 0.0)


def _label_head(
    task: RoundTask, head: int, tiles: list[tuple[np.ndarray, Tensor]]
) -> RoundClusters:
    """Return the balanced labels of a head.

    A sample's distance is -log p of its label.
    """
    sharpness, score = task.refresh.sharpness, _scores_of(task, head, tiles)
    began, passes = time.monotonic(), 0

    def show() -> None:
        nonlocal passes
        passes += 1
        seconds = time.monotonic() - began
        task.progress(head, Progress(passes, ITERATIONS + 1, math.nan, 0, seconds))

    world = replace(task.world, device=task.device)  # a worker's world is that of a CPU
    balanced = balance(
        score, task.config.k, iterations=ITERATIONS, tolerance=TOLERANCE, world=world, alive=show
    )
    own = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in tiles)])
    labels, costs = _labels(balanced, score, sharpness)
    assignments, distances = spread(labels, costs, own, len(task.rows), task.world)
    clusters = _clusters(task, assignments, distances, balanced.iterations, balanced.error)
    return replace(clusters, rule=_rule(task, head, balanced))


def _rule(task: RoundTask, head: int, balanced: Balance) -> dict[str, np.ndarray]:
    """Return what tells a row's label: the head's weights, and the scalings of the clusters."""
    assert task.scorer is not None
    parts = {name: task.scorer[name][head].cpu().numpy() for name in ("weight", "bias")}
    return {**parts, "scalings": balanced.scalings.cpu().numpy()}


def _labels(
    balanced: Balance, score: Callable[[], Iterable[Tensor]], sharpness: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's labels and -log p of them."""
    labels, costs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for scores in score():
        chosen = balanced.hard(scores)
        labels.append(chosen.int().cpu().numpy())
        costs.append((scores.gather(1, chosen[:, None])[:, 0] / -sharpness).cpu().numpy())
    return np.concatenate(labels), np.concatenate(costs)


def _own_tiles(task: RoundTask) -> list[tuple[Int64[np.ndarray, " m"], Tensor]]:
    """Return this rank's tiles of sample ids, and their rows if they lie on a GPU.

    The tiles are the same for any number of ranks, and so are the bits of their scores.
    """
    size = max(1, CELLS // task.config.k)
    starts = range(0, len(task.valid), size)
    own = np.array_split(np.arange(len(starts)), task.world.size)[task.world.rank]
    tiles = []
    for start in (starts[i] for i in own):
        ids = task.valid[start : start + size]
        on_gpu = task.device.type != "cpu"
        tiles.append((ids, _read(task, ids) if on_gpu else torch.zeros(0)))
        task.report.alive()
    return tiles


def _read(task: RoundTask, ids: Int64[np.ndarray, " m"]) -> Float[Tensor, "m D"]:
    return torch.from_numpy(np.array(task.rows[ids])).to(task.device)


def _scores_of(
    task: RoundTask, head: int, tiles: list[tuple[np.ndarray, Tensor]]
) -> Callable[[], Iterable[Tensor]]:
    """Return what yields lambda log p of this rank's tiles, as often as it is called."""
    assert task.scorer is not None
    weight, bias = (task.scorer[name][head].to(task.device) for name in ("weight", "bias"))
    kept: list[Tensor] = []

    def score(ids: np.ndarray, rows: Tensor) -> Tensor:
        if len(rows) == 0:
            rows = _read(task, ids)
        with full_precision():
            logits = torch.addmm(bias, rows.float(), weight.T)
        return logits.log_softmax(1) * task.refresh.sharpness

    def scores() -> Iterable[Tensor]:
        if kept:
            yield from kept
            return
        keeps = sum(len(ids) for ids, _ in tiles) * task.config.k <= KEPT
        for ids, rows in tiles:
            tile = score(ids, rows)
            task.report.alive()
            if keeps:
                kept.append(tile)
            yield tile

    return scores


def _clusters(
    task: RoundTask, assignments: np.ndarray, distances: np.ndarray, iterations: int, error: float
) -> RoundClusters:
    """Return a head's clusters: its weights take the part of centroids, and are not copied."""
    none = np.zeros(0, np.int64)
    return RoundClusters(
        assignments,
        distances,
        centroids=np.zeros((task.config.k, 0), np.float32),
        inertia=float(np.nansum(distances, dtype=np.float64)),
        empty_fixed=none,
        claimed=none,
        facts={"forced": 0, "empty_repairs": 0, "iterations": iterations, "imbalance": error},
    )
