"""All clusters of the last round, for the page to filter and sort, and the cluster of every key.

Each cluster has its size, most frequent class, purity, tightness and drift. It has the images that
are nearest to its centroid, and those furthest from it. The page draws a few clusters at a time
(browser.js). What is in it is bounded: thumbnails, clusters and keys, and a sentence says what was
left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from cluster_jobs.results.by_cluster import ByCluster, drift, majorities, tightness
from cluster_jobs.results.pictures import Pictures, data_uri
from deepclust.data.images.decode import DecodeError
from deepclust.data.shards.index import Index

MOST_IMAGES = 6000  # in all, some 1.4 KB each
MOST_CLUSTERS = 2000
MOST_KEYS = 200_000
SIDE = 48  # pixels
FEWEST, MOST = 2, 12  # images of a cluster, of which a third are the furthest


@dataclass(frozen=True)
class Browser:
    """The clusters as the page's script takes them, the keys by sample, and what was left out."""

    clusters: list[dict[str, Any]]
    keys: dict[str, list[Any]] | None
    note: str = ""
    missing: int = 0  # images that could not be read

    @property
    def labelled(self) -> bool:
        """Whether clusters have a most frequent class."""
        return any(cluster["purity"] is not None for cluster in self.clusters)

    @property
    def compared(self) -> bool:
        """Whether clusters have a drift since the round before."""
        return any(cluster["drift"] is not None for cluster in self.clusters)


def browse(
    index: Index,
    assignments: Int32[np.ndarray, " n"],
    distances: Float32[np.ndarray, " n"],
    seeds: list[str | None],
    max_pixels: int,
    before: Int32[np.ndarray, " n"] | None = None,
) -> Browser:
    """Return the largest clusters with their images, and the cluster of each key.

    `before` are the assignments of the round before.
    """
    order = ByCluster(assignments, distances)
    sizes, k = order.sizes, order.k
    numbers = _Numbers(
        sizes, *majorities(index.labels, assignments, k), tightness(assignments, distances, k),
        drift(before, assignments, k),
    )  # fmt: skip
    shown = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)][:MOST_CLUSTERS]
    each = int(np.clip(MOST_IMAGES // max(1, len(shown)), FEWEST, MOST))
    chosen = [_ends(order.members(cluster), each) for cluster in shown.tolist()]
    ids = np.concatenate([np.zeros(0, np.int64), *(end for both in chosen for end in both)])
    names = dict(zip(ids.tolist(), index.keys.of(ids), strict=True))
    clusters = []
    with Pictures(index, max_pixels) as pictures:
        thumbnails = _Thumbnails(pictures, names)
        for cluster, (near, far) in zip(shown.tolist(), chosen, strict=True):
            record = numbers.record(cluster, index, seeds)
            record |= {"near": thumbnails.of(near), "far": thumbnails.of(far)}
            clusters.append(record)
    keys, note = _keys(index, assignments), _note(index, sizes, len(shown))
    return Browser(clusters, keys, note, thumbnails.missing)


def _ends(
    members: Int64[np.ndarray, " m"], most: int
) -> tuple[Int64[np.ndarray, " near"], Int64[np.ndarray, " far"]]:
    """Return so many members of a cluster: the nearest to its centroid, and the furthest."""
    far = min(most // 3, max(0, len(members) - most))
    return members[: most - far], members[::-1][:far]


@dataclass(frozen=True)
class _Numbers:
    """What is said of every cluster [k]."""

    sizes: Int64[np.ndarray, " k"]
    purity: Float64[np.ndarray, " k"]
    majority: Int64[np.ndarray, " k"]
    distance: Float64[np.ndarray, " k"]
    drift: Float64[np.ndarray, " k"]

    def record(self, cluster: int, index: Index, seeds: list[str | None]) -> dict[str, Any]:
        """Return the numbers of a cluster; None where there are no labels, or no round before."""
        return {
            "id": cluster,
            "size": int(self.sizes[cluster]),
            "class": class_name(index, int(self.majority[cluster])),
            "purity": _rounded(self.purity[cluster]),
            "distance": _rounded(self.distance[cluster]),
            "drift": _rounded(self.drift[cluster]),
            "seed": seeds[cluster] if cluster < len(seeds) else None,
        }


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def class_name(index: Index, label: int) -> str | None:
    """Return the name of a label, None for none (-1)."""
    names = index.class_names
    return None if label < 0 else names[label] if names else f"class {label}"


class _Thumbnails:
    """Makes images small for the page; counts those that cannot be decoded."""

    def __init__(self, pictures: Pictures, names: dict[int, str]) -> None:
        self.pictures, self.names, self.missing = pictures, names, 0

    def of(self, sample_ids: Int64[np.ndarray, " m"]) -> list[list[str]]:
        """Return a key and a data URI for each image that can be decoded."""
        made = []
        for sample_id in sample_ids.tolist():
            try:
                image = self.pictures.read(sample_id)
            except DecodeError:
                self.missing += 1
                continue
            made.append([self.names[sample_id], data_uri(image, SIDE, 72)])
        return made


def _keys(index: Index, assignments: Int32[np.ndarray, " n"]) -> dict[str, list[Any]] | None:
    """Return all keys and their clusters, or None where they are too many for a page."""
    if len(index) > MOST_KEYS:
        return None
    return {"keys": list(index.keys), "clusters": assignments.tolist()}


def _note(index: Index, sizes: Int64[np.ndarray, " k"], shown: int) -> str:
    """Return what is not on the page, and where it is."""
    used, parts = int(np.count_nonzero(sizes)), []
    if used > shown:
        parts.append(f"The {shown:,} largest of {used:,} clusters are here.")
    if len(index) > MOST_KEYS:
        parts.append(f"{len(index):,} keys are too many to search here.")
    if parts:
        parts.append("`deepclust assignments` writes them all.")
    return " ".join(parts)
