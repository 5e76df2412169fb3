"""The clusters of a round to look at: a table of all, the members of one, and their pictures.

What is read is kept for a few runs: 16 bytes a sample and the mapped columns of the index.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cluster_jobs.report.browser import class_name
from cluster_jobs.results.assignments import open_clustered
from cluster_jobs.results.by_cluster import ByCluster, before_of, drift, majorities, tightness
from cluster_jobs.results.pictures import Pictures, small
from cluster_jobs.web.answers import NotThereError
from deepclust.data.images.decode import DecodeError
from deepclust.data.shards.index import Index
from deepclust.data.shards.keys import read_keys
from deepclust.errors import DataError, RecipeError
from deepclust.run.directory import Run
from deepclust.run.round_files import read_array, read_assignments
from deepclust.trained.trained_run import choose_round, seeded_classes

MOST_VIEWS = 4
MOST_HITS = 200
SORTS = ("size", "purity", "tightness", "drift", "id")
ORDERS = ("near", "far")
Record = dict[str, Any]


@dataclass
class View:
    """One clustering of a run, of n samples in k clusters."""

    round: int
    head: int
    index: Index
    assignments: np.ndarray  # int32 [n]
    distances: np.ndarray  # float32 [n]
    names: list[str | None]  # of seeded clusters
    max_pixels: int
    before: np.ndarray | None = None  # int32 [n]: the clusters of the round before

    def __post_init__(self) -> None:
        self.order = ByCluster(self.assignments, self.distances, len(self.names))
        k = self.order.k
        self.purity, self.majority = majorities(self.index.labels, self.assignments, k)
        self.drift = drift(self.before, self.assignments, k)
        self.tightness = tightness(self.assignments, self.distances, k)

    @property
    def sizes(self) -> np.ndarray:
        """The images of each cluster [k]."""
        return self.order.sizes

    def members(self, cluster: int) -> np.ndarray:
        """Return the sample ids of a cluster, the nearest to its centroid first."""
        if not 0 <= cluster < self.order.k:
            raise NotThereError(f"there is no cluster {cluster}: {self.order.k:,} there are")
        return self.order.members(cluster)

    def page(
        self, sort: str, descending: bool, offset: int, limit: int, text: str = "", least: int = 0
    ) -> Record:
        """Return the clusters of a page, in an order of SORTS; those without a value come last.

        `text`: only clusters with it in the name of their class or seed. `least`: their size.
        """
        if sort not in SORTS:
            raise RecipeError(f"sort is one of {', '.join(SORTS)}, not {sort[:50]!r}")
        columns = {
            "size": self.sizes, "purity": self.purity, "tightness": self.tightness,
            "drift": self.drift, "id": np.arange(len(self.sizes)),
        }  # fmt: skip
        values = columns[sort].astype(np.float64)
        order = np.argsort(-values if descending else values, kind="stable")
        order = order[self.sizes[order] >= least]
        chosen = [one for one in order.tolist() if not text or self._is_named(one, text.lower())]
        page = [self.cluster(one) for one in chosen[offset : offset + limit]]
        return {"total": len(chosen), "clusters": page}

    def _is_named(self, cluster: int, text: str) -> bool:
        seed = self.names[cluster] if cluster < len(self.names) else None
        named = class_name(self.index, int(self.majority[cluster]))
        return any(text in name.lower() for name in (seed, named) if name) or text == str(cluster)

    def cluster(self, cluster: int) -> Record:
        """Return the numbers of a cluster."""
        members = self.members(cluster)
        return {
            "id": cluster,
            "size": len(members),
            "class": class_name(self.index, int(self.majority[cluster])),
            "purity": float(self.purity[cluster]),
            "tightness": float(self.tightness[cluster]),
            "drift": float(self.drift[cluster]),
            "seed": self.names[cluster] if cluster < len(self.names) else None,
            "samples": members[:4].tolist(),
        }

    def images(self, cluster: int, order: str, offset: int, limit: int) -> Record:
        """Return the members of a cluster: the nearest to the centroid first, or the furthest."""
        if order not in ORDERS:
            raise RecipeError(f"order is one of {', '.join(ORDERS)}, not {order[:50]!r}")
        members = self.members(cluster)
        members = members[::-1] if order == "far" else members
        chosen = members[offset : offset + limit].tolist()
        return {"total": len(members), "images": self.several(chosen)}

    def image(self, sample_id: int) -> Record:
        """Return what is known of an image."""
        if not 0 <= sample_id < len(self.index):
            raise NotThereError(f"there is no image {sample_id}: {len(self.index):,} there are")
        return self.several([sample_id])[0]

    def several(self, sample_ids: Sequence[int]) -> list[Record]:
        """Return what is known of images: the keys of a shard are read once."""
        keys = self.index.keys.of(np.array(sample_ids, np.int64))
        return [self._record(one, key) for one, key in zip(sample_ids, keys, strict=True)]

    def _record(self, sample_id: int, key: str) -> Record:
        label = -1 if self.index.labels is None else int(self.index.labels[sample_id])
        return {
            "id": sample_id,
            "key": key,
            "cluster": int(self.assignments[sample_id]),
            "distance": float(self.distances[sample_id]),
            "class": class_name(self.index, label),
        }

    def search(self, text: str) -> list[Record]:
        """Return the images with a text in their key, shard by shard, up to a bound."""
        hits: list[int] = []
        shards = range(len(self.index.bases) - 1)
        if not text:
            return []
        for base, keys in zip(self.index.bases, read_keys(self.index.folder, shards), strict=False):
            mask = pc.match_substring(keys, text, ignore_case=True)
            places = np.flatnonzero(np.asarray(mask)) + int(base)
            hits += places[: MOST_HITS - len(hits)].tolist()
            if len(hits) >= MOST_HITS:
                break
        return self.several(hits)

    def picture(self, sample_id: int, side: int) -> bytes:
        """Return an image decoded, made small, and written as JPEG."""
        self.image(sample_id)
        try:
            with Pictures(self.index, self.max_pixels) as pictures:
                return small(pictures.read(sample_id), side, 85)
        except DecodeError as error:
            raise DataError(f"image {sample_id} cannot be decoded: {error}") from error


@dataclass
class _Entry:
    lock: threading.RLock = field(default_factory=threading.RLock)
    view: View | None = None
    close: Callable[[], None] = lambda: None
    is_closed: bool = False


class Views:
    """The clusterings that were looked at last; each is used by one request at a time."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, run: Run, round_: int | None, head: int) -> Iterator[View]:
        """Yield a round's clustering (default: the last) without reading the URLs of its recipe."""
        number = choose_round(run, round_)
        seen = (run.round(number) / "assignments" / "manifest.json").stat()
        key = (run.path, number, head, seen.st_mtime_ns, seen.st_ino)
        while True:
            entry = self._entry(key)
            with entry.lock:
                if entry.is_closed:
                    continue
                if entry.view is None:
                    entry.view, entry.close = _read(run, number, head)
                yield entry.view
                return

    def _entry(self, key: tuple[Any, ...]) -> _Entry:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            old = self._entries.popitem(last=False)[1] if len(self._entries) > MOST_VIEWS else None
        if old is not None:
            with old.lock:
                old.is_closed = True
                old.close()
        return entry


def _read(run: Run, number: int, head: int) -> tuple[View, Callable[[], None]]:
    """Return a clustering of a run, and what closes its index."""
    with contextlib.ExitStack() as stack:
        index = stack.enter_context(open_clustered(run, number, only_read=True, remote=False))
        assignments = read_assignments(run, number)
        if not 0 <= head < len(assignments):
            raise NotThereError(f"there is no head {head}: {len(assignments)} there are")
        distances = read_array(run.round(number) / "assignments", "distances.npy", dims=2)
        if distances.shape != assignments.shape or assignments.shape[1] != len(index):
            raise DataError(f"round {number} of {run.path} does not fit its images")
        classes = seeded_classes(run, number)
        names = [] if classes is None else classes[:-1].tolist()
        most = run.recipe.data.max_pixels
        before = before_of(run, number, head)
        own = (assignments[head], distances[head])
        view = View(number, head, index, *own, names, most, before)
        return view, stack.pop_all().close
