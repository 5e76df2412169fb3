"""Members of a cluster: the unsure, the alike, those near an image, and where they were before.

Each looks at the features that a round has kept, memory-mapped, tile by tile. How many members are
compared is bounded, and the answer says how many were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cluster_jobs.results.duplicates import kept_rows, near_duplicates
from cluster_jobs.web.answers import NotThereError
from cluster_jobs.web.clusters import View
from deepclust.run.directory import Run
from deepclust.run.round_files import read_assignments
from deepclust.trained.labelling import label, rule_of

MOST_COMPARED = 5000  # members, the nearest to the centroid
TILE = 2**15  # rows
Record = dict[str, Any]


def borderline(run: Run, view: View, cluster: int) -> Record:
    """Return the members for which another cluster is nearly as near, the least sure first.

    `margin`: by how much that cluster is farther. It is below 0 where it is nearer.
    """
    members = np.sort(view.members(cluster)[:MOST_COMPARED])
    rows = kept_rows(run, view.round)[members]
    labels = label(rule_of(run, view.round), rows, view.head)
    # a round that keeps clusters above a size has members that are nearer to another one
    moved = labels.clusters != cluster
    others = np.where(moved, labels.clusters, labels.seconds)
    margins = np.where(moved, labels.distances - view.distances[members], labels.margins)
    order = np.argsort(margins, kind="stable")[:500]
    images = [
        one | {"second": int(others[i]), "margin": float(margins[i])}
        for i, one in zip(order, view.several(members[order].tolist()), strict=True)
    ]
    return {"compared": len(members), "total": len(images), "images": images}


def duplicates(run: Run, view: View, cluster: int, similarity: float) -> Record:
    """Return groups of members whose features have at least that cosine."""
    members = np.sort(view.members(cluster)[:MOST_COMPARED])
    rows = np.asarray(kept_rows(run, view.round)[members])
    groups = near_duplicates(rows, np.zeros(len(rows), np.int32), similarity).groups
    firsts = [int(first) for first in np.unique(groups[groups >= 0])][:200]
    alike = [np.flatnonzero(groups == first) for first in firsts]
    named = [view.several(members[places[:50]].tolist()) for places in alike]
    return {"compared": len(members), "groups": named}


def neighbours(run: Run, view: View, sample: int, within: str, most: int) -> Record:
    """Return the images that are nearest to one, in its cluster or among all."""
    own = view.image(sample)
    if own["cluster"] < 0:
        raise NotThereError(f"image {sample} was excluded, so it has no features")
    rows = kept_rows(run, view.round)
    ids = np.flatnonzero(view.assignments >= 0)
    if within == "cluster":
        ids = np.sort(view.members(own["cluster"]))
    squared = _squared(rows, ids, np.asarray(rows[sample], np.float32))
    squared[ids == sample] = np.inf
    order = np.argsort(squared, kind="stable")[: min(most, len(ids) - 1)]
    images = [
        one | {"distance": float(squared[i])}
        for i, one in zip(order, view.several(ids[order].tolist()), strict=True)
    ]
    return {"image": own, "compared": len(ids), "images": images}


def _squared(
    rows: np.ndarray, ids: Int64[np.ndarray, " m"], row: Float32[np.ndarray, " d"]
) -> Float32[np.ndarray, " m"]:
    """Return the squared distances from some rows to one."""
    parts = [ids[start : start + TILE] for start in range(0, len(ids), TILE)]
    tiles = (np.asarray(rows[part], np.float32) for part in parts)
    found = [((tile - row) ** 2).sum(1) for tile in tiles]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def lineage(run: Run, number: int, head: int, cluster: int, most: int) -> list[Record]:
    """Return where a cluster's images were, round by round backwards.

    From each round it goes to the cluster that most of them were in. `share`: of the later
    cluster's images, those that were in it.
    """
    members = np.flatnonzero(_assignments(run, number, head) == cluster)
    found = [{"round": number, "id": cluster, "size": len(members), "share": 1.0}]
    for earlier in [one for one in run.rounds() if one < number][::-1][:most]:
        before = _assignments(run, earlier, head)
        if len(before) == 0 or len(members) == 0 or members[-1] >= len(before):
            break
        known = before[members]
        known = known[known >= 0]
        if not len(known):
            break
        counts = np.bincount(known)
        best = int(counts.argmax())
        share = float(counts[best] / len(members))
        members = np.flatnonzero(before == best)
        found.append({"round": earlier, "id": best, "size": len(members), "share": share})
    return found


def _assignments(run: Run, number: int, head: int) -> Int32[np.ndarray, " n"]:
    """Return the clusters of a head in a round, or none where the round lacks that head."""
    every = read_assignments(run, number)
    return every[head] if head < len(every) else np.zeros(0, np.int32)
