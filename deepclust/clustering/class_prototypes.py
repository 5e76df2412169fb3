"""Class prototypes: the centroids that a few labels give, pinned or used as a start in k-means.

A prototype is the unit mean of a class's labelled rows in the clustered space. Suave and Daino also
use the centroid of a class's cluster as its prototype. They are centroids 0..M-1 in the order
of the classes, and the free ones follow. A seeded clustering is spherical: under L2 a unit
prototype wins nothing, since means of unit rows are shorter.

Sums are exact (`exact_sums.py`), so every process computes the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy  # imports its parts when they are used
import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.init import start
from deepclust.clustering.nearest import squared_distances
from deepclust.clustering.options import NOTHING_GIVEN, KMeansOptions
from deepclust.clustering.points import Points
from deepclust.clustering.precision import own_threads
from deepclust.clustering.two_level import kmeans_up_to
from deepclust.clustering.whiten import Whitening
from deepclust.errors import NumericalError
from deepclust.world import derive

SMALLEST = 1e-5  # norm of a mean that still has a direction; float16 rows are good to 1e-3
BLOCK = 4096  # rows compared with their class's prototypes at a time


@dataclass(frozen=True)
class Prototypes:
    """M unit rows, one or several of each class, in the order of the classes."""

    rows: Float32[np.ndarray, "M d"]
    class_of: Int32[np.ndarray, " M"]
    counts: Int64[np.ndarray, " M"]  # labelled rows behind each


def class_prototypes(
    points: ArrayPoints,
    classes: Int32[np.ndarray, " m"],
    names: list[str],
    each: int = 1,
    seed: int = 0,
) -> Prototypes:
    """Return at most `each` prototypes of a class, from labelled points and their class ids.

    One is the unit mean of the class's rows. Several are the centroids of spherical k-means inside
    the class, one for each distinct row if those are fewer.

    Raises `NumericalError` naming a class whose rows cancel: their mean has no direction.
    """
    points = points.configure(spherical=True, backend="torch")
    means = _means(points, classes, names)
    if each == 1:
        return means
    parts = []
    order = np.argsort(classes, kind="stable")
    for c, ids in enumerate(np.split(order, np.cumsum(means.counts)[:-1])):
        own = derive(seed, "prototypes", names[c])
        options = KMeansOptions(each, seed=own, spherical=True)
        inside = kmeans_up_to(points.select(ids), options)
        sizes = np.bincount(inside.assignments, minlength=len(inside.centroids))
        label = np.full(len(sizes), c, np.int32)
        parts.append(Prototypes(inside.centroids, label, sizes.astype(np.int64)))
    return _join(parts)


def _means(points: ArrayPoints, classes: Int32[np.ndarray, " m"], names: list[str]) -> Prototypes:
    """Return one prototype of each class: float64 sums, int64 counts."""
    points.check_finite()
    assignment = points.sum_clusters(torch.from_numpy(classes).to(points.device), len(names))
    counts = assignment.counts.cpu().numpy()
    means = assignment.sums.cpu().numpy() / np.maximum(counts, 1)[:, None]
    flat = np.flatnonzero(np.linalg.norm(means, axis=1) < SMALLEST)
    if len(flat):
        raise NumericalError(
            f"the {counts[flat[0]]} labelled rows of class {names[flat[0]]!r} cancel: their mean "
            "has no direction, so the class has no prototype. Check its labels, or set "
            "seeds.prototypes to 2 or more."
        )
    return Prototypes(
        _unit(means).astype(np.float32), np.arange(len(names), dtype=np.int32), counts
    )


def _join(parts: list[Prototypes]) -> Prototypes:
    columns = [[getattr(p, name) for p in parts] for name in ("rows", "class_of", "counts")]
    return Prototypes(*(np.concatenate(column) for column in columns))


def _unit(rows: Float[np.ndarray, "M d"]) -> Float64[np.ndarray, "M d"]:
    """Return unit rows in float64.

    A zero row stays zero.
    """
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms == 0, 1.0, norms))


def carry_over(
    rows: Float32[np.ndarray, "M d"], before: Whitening | None, now: Whitening | None
) -> Float64[np.ndarray, "M e"]:
    """Map unit rows of one whitened space to another one: unit(p @ pinv(W_before) @ W_now).

    Both spaces are centred, so their means do not matter. What the old space has dropped is lost.
    With equal whitenings nothing changes, and axes that turn, flip or swap are followed. Rows that
    are not whitened (None) stay as they are.
    """
    if before is None or now is None:
        return rows.astype(np.float64)
    with own_threads():
        back = np.linalg.pinv(before.matrix.astype(np.float64), rcond=1e-8)
        return _unit(rows.astype(np.float64) @ back @ now.matrix.astype(np.float64))


def average(
    new: Prototypes,
    old: Prototypes,
    before: Whitening | None,
    now: Whitening | None,
    momentum: float,
) -> Prototypes:
    """Return unit(momentum * carried old + (1 - momentum) * new), the moving average over rounds.

    Several prototypes of a class are matched to the old ones by the Hungarian method on cosines,
    and are put in their order. One without a partner, or whose average has no direction, stays
    as it is.
    """
    moved = carry_over(old.rows, before, now)
    with own_threads():
        cosines = new.rows.astype(np.float64) @ moved.T
    partner = _partners(new, old, cosines)
    order = np.lexsort((partner, new.class_of))
    new = Prototypes(new.rows[order], new.class_of[order], new.counts[order])
    if momentum == 0:
        return new
    partner = partner[order]
    mine = np.flatnonzero(partner < len(moved))
    theirs = partner[mine]
    mixed = momentum * moved[theirs] + (1 - momentum) * new.rows[mine].astype(np.float64)
    sound = (np.linalg.norm(mixed, axis=1) > SMALLEST) & moved[theirs].any(1)
    rows = new.rows.copy()
    rows[mine[sound]] = _unit(mixed[sound]).astype(np.float32)
    return replace(new, rows=rows)


def refine(points: Points, start: Prototypes, weight: float, passes: int = 3) -> Prototypes:
    """Return unit(m p + weight c): prototype p of m labelled rows, centre c of all rows near it.

    One pass gives c, the unit mean of the rows whose nearest prototype it is. The next passes start
    from the refined ones. The hard form of refined prototypes by soft k-means (Ren et al. 2018,
    arXiv:1803.00676, eq. 6), where every unlabelled row counts as a labelled one. With few labels
    of a class the labels would then only decide the start, so all unlabelled rows together count as
    `weight` here. Called by all ranks that share `points`.
    """
    points = points.configure(spherical=True, backend="torch")
    own = start.counts[:, None] * start.rows.astype(np.float64)
    rows = start.rows
    for _ in range(passes):
        sums = points.assign_to(torch.from_numpy(rows).to(points.device)).sums.cpu().numpy()
        mixed = own + weight * _unit(sums)
        sound = np.linalg.norm(mixed, axis=1) > SMALLEST
        rows = np.where(sound[:, None], _unit(mixed), rows).astype(np.float32)
    return replace(start, rows=rows)


def _partners(
    new: Prototypes, old: Prototypes, cosines: Float64[np.ndarray, "M L"]
) -> Int64[np.ndarray, " M"]:
    """Return the old prototype of the same class that each new one continues, or L for none."""
    partner = np.full(len(new.rows), len(old.rows))
    for c in np.unique(new.class_of):
        mine, theirs = np.flatnonzero(new.class_of == c), np.flatnonzero(old.class_of == c)
        i, j = scipy.optimize.linear_sum_assignment(cosines[np.ix_(mine, theirs)], maximize=True)
        partner[mine[i]] = theirs[j]
    return partner


def start_from_prototypes(
    points: Points, prototypes: Prototypes, options: KMeansOptions
) -> Float32[np.ndarray, "k d"]:
    """Return a start of k-means without pins: the prototypes, then free centroids by `init`."""
    points = points.configure(spherical=True, backend="torch")
    rows = torch.from_numpy(prototypes.rows).to(points.device)
    free = start(points, rows, options, NOTHING_GIVEN)
    return torch.cat([rows, free]).cpu().numpy()


def nearest_of_class(
    points: ArrayPoints,
    classes: Int32[np.ndarray, " m"],
    class_of: Int32[np.ndarray, " M"],
    centroids: Float32[np.ndarray, "k d"],
) -> tuple[Int32[np.ndarray, " m"], Float32[np.ndarray, " m"]]:
    """Return labelled points' nearest centroid of their class, and the squared distance to it.

    The first M centroids are those of classes `class_of`. Every class has at least one.
    """
    points = points.configure(spherical=True, backend="torch")
    own = torch.from_numpy(centroids[: len(class_of)]).to(points.device)
    wanted = torch.from_numpy(classes).to(points.device)
    of = torch.from_numpy(class_of).to(points.device)
    ids, distances = [of[:0]], [own[:0, 0]]
    for at in range(0, points.n, BLOCK):
        rows = points.read_tile(at, BLOCK)
        foreign = wanted[at : at + BLOCK, None] != of
        nearest = (own.square().sum(1) - 2 * rows @ own.T).masked_fill(foreign, torch.inf).argmin(1)
        ids.append(nearest.to(torch.int32))
        distances.append(squared_distances(rows, own, nearest))
    return torch.cat(ids).cpu().numpy(), torch.cat(distances).cpu().numpy()


def score_seeds(
    prototypes: Prototypes,
    names: list[str],
    sizes: Int64[np.ndarray, " k"],
    clusters: Int32[np.ndarray, " h"],
    classes: Int32[np.ndarray, " h"],
) -> dict[str, Any]:
    """Return statistics of the seeded clusters, from h held-out samples' clusters and classes.

    `sizes`: of all clusters, the seeded ones first. A class len(names) is one that has no seeds.
    A seeded cluster has its share of all points, its purity and its recall. Purity is the share of
    its held-out samples that are of its class. Recall is the share of its class's held-out samples
    that are in it. A share of nothing is None. `confusion` counts true classes (rows) by the
    classes of clusters (columns), each with "other" at the end: classes without seeds, and free
    clusters.
    """
    other, m = len(names), len(prototypes.rows)
    column = np.minimum(clusters, m)  # all free clusters are one
    cells = classes.astype(np.int64) * (m + 1) + column
    table = np.bincount(cells, minlength=(other + 1) * (m + 1)).reshape(other + 1, m + 1)
    hits = table[prototypes.class_of, np.arange(m)]
    seeded = _describe_clusters(prototypes, names, sizes, table)
    confusion = np.zeros((other + 1, other + 1), np.int64)
    np.add.at(confusion.T, np.append(prototypes.class_of, other), table.T)
    return {
        "held_out": len(classes),
        "share": float(sizes[:m].sum() / max(int(sizes.sum()), 1)),
        "purity": _share(hits.sum(), table[:, :m].sum()),
        "recall": _share(hits.sum(), table[:other].sum()),
        "clusters": seeded,
        "classes": [*names, "other"],
        "confusion": confusion.tolist(),
    }


def _describe_clusters(
    prototypes: Prototypes,
    names: list[str],
    sizes: Int64[np.ndarray, " k"],
    table: Int64[np.ndarray, "c M1"],
) -> list[dict[str, Any]]:
    """Return a record of each seeded cluster.

    `table` counts classes by clusters.
    """
    total, inside, of_class = max(int(sizes.sum()), 1), table.sum(0), table.sum(1)
    return [
        {
            "cluster": j,
            "class": names[c],
            "labelled": int(prototypes.counts[j]),
            "size": int(sizes[j]),
            "share": float(sizes[j] / total),
            "purity": _share(table[c, j], inside[j]),
            "recall": _share(table[c, j], of_class[c]),
        }
        for j, c in enumerate(prototypes.class_of)
    ]


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None
