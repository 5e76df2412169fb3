"""Class prototypes: the centroids that a few labels give, pinned or used as a start in k-means.

A prototype is the unit mean of a class's labelled rows in the whitened space (DESIGN section 5;
the labelled seed of Suave and Daino, where a class's prototype is its cluster's centroid). They are
centroids 0..M-1 in the order of the classes; the free ones follow. A seeded clustering is
spherical: under L2 a unit prototype wins nothing, since means of unit rows are shorter.

Sums are exact (`exact.py`), so prototypes are the same to the bit whoever computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64
from scipy.optimize import linear_sum_assignment

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.init import start
from deepclust.clustering.nearest import squared_distances
from deepclust.clustering.points import Points
from deepclust.clustering.two_level import up_to
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


def prototypes(
    points: ArrayPoints,
    classes: Int32[np.ndarray, " m"],
    names: list[str],
    each: int = 1,
    seed: int = 0,
) -> Prototypes:
    """Of labelled points and their classes (ids below len(names)), at most `each` of a class.

    One is the unit mean of the class's rows. Several are the centroids of spherical k-means inside
    the class, as many as it has distinct rows if those are fewer.

    Raises `NumericalError` naming a class whose rows cancel: their mean has no direction.
    """
    points = points.configured(unit=True, backend="torch")
    found = _means(points, classes, names)
    if each == 1:
        return found
    parts = [found]
    order = np.argsort(classes, kind="stable")
    for c, ids in enumerate(np.split(order, np.cumsum(found.counts)[:-1])):
        own = derive(seed, "prototypes", names[c])
        inside = up_to(points.select(ids), each, seed=own, spherical=True)
        sizes = np.bincount(inside.assignments, minlength=len(inside.centroids))
        label = np.full(len(sizes), c, np.int32)
        parts.append(Prototypes(inside.centroids, label, sizes.astype(np.int64)))
    return _joined(parts[1:])


def _means(points: ArrayPoints, classes: Int32[np.ndarray, " m"], names: list[str]) -> Prototypes:
    """One prototype a class: float64 sums, int64 counts."""
    points.check_finite()
    found = points.total(torch.from_numpy(classes).to(points.device), len(names))
    counts = found.counts.cpu().numpy()
    means = found.sums.cpu().numpy() / np.maximum(counts, 1)[:, None]
    flat = np.flatnonzero(np.linalg.norm(means, axis=1) < SMALLEST)
    if len(flat):
        raise NumericalError(
            f"the {counts[flat[0]]} labelled rows of class {names[flat[0]]!r} cancel: their mean "
            "has no direction, so the class has no prototype. Look at its labels, or set "
            "seeds.prototypes to 2 or more."
        )
    return Prototypes(
        _unit(means).astype(np.float32), np.arange(len(names), dtype=np.int32), counts
    )


def _joined(parts: list[Prototypes]) -> Prototypes:
    columns = [[getattr(p, name) for p in parts] for name in ("rows", "class_of", "counts")]
    return Prototypes(*(np.concatenate(column) for column in columns))


def _unit(rows: Float[np.ndarray, "M d"]) -> Float64[np.ndarray, "M d"]:
    """Unit rows in float64; a zero row stays zero."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(norms == 0, 1.0, norms))


def carried(
    rows: Float32[np.ndarray, "M d"], before: Whitening, now: Whitening
) -> Float64[np.ndarray, "M e"]:
    """Unit rows of one whitened space in another one: unit(p @ pinv(W_before) @ W_now).

    Both spaces are centred, so their means play no part; what the old space has dropped is lost.
    With equal whitenings nothing changes, and axes that turn, flip or swap are followed. That the
    features themselves mean something else after a round of training is what the average is for.
    """
    back = np.linalg.pinv(before.matrix.astype(np.float64), rcond=1e-8)
    return _unit(rows.astype(np.float64) @ back @ now.matrix.astype(np.float64))


def averaged(
    new: Prototypes,
    old: Prototypes,
    before: Whitening,
    now: Whitening,
    momentum: float,
) -> Prototypes:
    """unit(momentum * carried old + (1 - momentum) * new), the moving average over rounds.

    Several prototypes of a class are matched to the old ones by the Hungarian method on cosines,
    and take their order. One without a partner, or whose average has no direction, stays as it is.
    """
    moved = carried(old.rows, before, now)
    partner = _partners(new, old, new.rows.astype(np.float64) @ moved.T)
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


def refined(points: Points, found: Prototypes, weight: float, passes: int = 3) -> Prototypes:
    """unit(m p + weight c): a prototype p of m labelled rows, and the centre c of all rows near it.

    One pass gives c, the unit mean of the rows whose nearest prototype it is; the next passes look
    around the refined ones. The hard form of refined prototypes by soft k-means (Ren et al. 2018,
    arXiv:1803.00676, eq. 6), where every unlabelled row counts as a labelled one: with few labels
    of a class that lets the labels say nothing but where to begin, so all of them count as
    `weight` here. Called by all ranks that share `points`.
    """
    points = points.configured(unit=True, backend="torch")
    own = found.counts[:, None] * found.rows.astype(np.float64)
    rows = found.rows
    for _ in range(passes):
        sums = points.visit(torch.from_numpy(rows).to(points.device)).sums.cpu().numpy()
        mixed = own + weight * _unit(sums)
        sound = np.linalg.norm(mixed, axis=1) > SMALLEST
        rows = np.where(sound[:, None], _unit(mixed), rows).astype(np.float32)
    return replace(found, rows=rows)


def _partners(
    new: Prototypes, old: Prototypes, cosines: Float64[np.ndarray, "M L"]
) -> Int64[np.ndarray, " M"]:
    """The old prototype of the same class that each new one continues; L for none."""
    partner = np.full(len(new.rows), len(old.rows))
    for c in np.unique(new.class_of):
        mine, theirs = np.flatnonzero(new.class_of == c), np.flatnonzero(old.class_of == c)
        i, j = linear_sum_assignment(cosines[np.ix_(mine, theirs)], maximize=True)
        partner[mine[i]] = theirs[j]
    return partner


def start_from(
    points: Points, found: Prototypes, k: int, init: str, seed: int
) -> Float32[np.ndarray, "k d"]:
    """A start of k-means with nothing pinned: the prototypes, then free centroids by `init`."""
    points = points.configured(unit=True, backend="torch")
    rows = torch.from_numpy(found.rows).to(points.device)
    free = start(points, k - len(rows), rows, init, None, seed)
    return torch.cat([rows, free]).cpu().numpy()


def claims(
    points: ArrayPoints,
    classes: Int32[np.ndarray, " m"],
    class_of: Int32[np.ndarray, " M"],
    centroids: Float32[np.ndarray, "k d"],
) -> tuple[Int32[np.ndarray, " m"], Float32[np.ndarray, " m"]]:
    """For labelled points the nearest centroid of their own class, and the squared distance to it.

    The first M centroids are those of classes `class_of`; every class has at least one.
    """
    points = points.configured(unit=True, backend="torch")
    own = torch.from_numpy(centroids[: len(class_of)]).to(points.device)
    wanted = torch.from_numpy(classes).to(points.device)
    of = torch.from_numpy(class_of).to(points.device)
    ids, distances = [of[:0]], [own[:0, 0]]
    for at in range(0, points.n, BLOCK):
        rows = points.tile(at, BLOCK)
        foreign = wanted[at : at + BLOCK, None] != of
        nearest = (own.square().sum(1) - 2 * rows @ own.T).masked_fill(foreign, torch.inf).argmin(1)
        ids.append(nearest.to(torch.int32))
        distances.append(squared_distances(rows, own, nearest))
    return torch.cat(ids).cpu().numpy(), torch.cat(distances).cpu().numpy()


def judged(
    found: Prototypes,
    names: list[str],
    sizes: Int64[np.ndarray, " k"],
    clusters: Int32[np.ndarray, " h"],
    classes: Int32[np.ndarray, " h"],
) -> dict[str, Any]:
    """What the seeded clusters are worth, by the clusters and classes of h held-out samples.

    `sizes`: of all clusters, the seeded ones first. A class len(names) is one that has no seeds.
    Of a seeded cluster: its share of all points; its purity, the share of its held-out samples that
    are of its class; its recall, the share of its class's that it holds (None where there are
    none). `confusion` counts true classes (rows) by the classes of clusters (columns), each with
    "other" at the end: classes without seeds, and free clusters.
    """
    other, total, m = len(names), max(int(sizes.sum()), 1), len(found.rows)
    column = np.minimum(clusters, m)  # all free clusters are one
    table = np.bincount(
        classes.astype(np.int64) * (m + 1) + column, minlength=(other + 1) * (m + 1)
    ).reshape(other + 1, m + 1)
    hits = table[found.class_of, np.arange(m)]
    of_class, inside = table.sum(1), table[:, :m].sum(0)
    rows = zip(
        range(m), found.class_of, found.counts, sizes, hits, inside, of_class[found.class_of],
        strict=False,
    )  # fmt: skip
    seeded = [
        {
            "cluster": j, "class": names[c], "labelled": int(n), "size": int(size),
            "share": float(size / total), "purity": _share(h, i), "recall": _share(h, o),
        }
        for j, c, n, size, h, i, o in rows
    ]  # fmt: skip
    confusion = np.zeros((other + 1, other + 1), np.int64)
    np.add.at(confusion.T, np.append(found.class_of, other), table.T)
    return {
        "held_out": len(classes),
        "share": float(sizes[:m].sum() / total),
        "purity": _share(hits.sum(), inside.sum()),
        "recall": _share(hits.sum(), of_class[:other].sum()),
        "clusters": seeded,
        "classes": [*names, "other"],
        "confusion": confusion.tolist(),
    }


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None
