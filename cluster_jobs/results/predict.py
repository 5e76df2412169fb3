"""Which cluster and class images are in that a run has never seen, as one Parquet or CSV table.

The weights are those that the last round was made with: of a finished run the exported ones. Images
of the run itself get the clusters of `deepclust assignments`, with the same roundings.

Classes are those of the clusters, where labels have named them. Else the nearest class mean gives
them (`trained/class_means.py`). Where a round gives the clusters, images are read twice for it. A
method without clusters is asked for classes alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster_jobs.results.features import Rows, Show, Way, rows_of
from cluster_jobs.results.samples import PATH, UNREAD, Part, has_paths, parts_of
from cluster_jobs.results.shards import open_given
from cluster_jobs.results.tables import check_suffix, write_table
from deepclust.data.shards.index import Index
from deepclust.errors import DataError
from deepclust.files import target_of
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run, has_file, manifest, open_run
from deepclust.run.round_files import read_array, read_assignments
from deepclust.trained.labelling import Answers, Labels, label
from deepclust.trained.nearest_mean import NearestMean
from deepclust.trained.trained_run import Labeller, best_labeller_of, labeller_of, namer_of

SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "shard": pa.string(),
        "key": pa.string(),
        "head": pa.int32(),
        "cluster": pa.int32(),
        "distance": pa.float32(),
        "second": pa.int32(),
        "margin": pa.float32(),
        "reason": pa.string(),
    }
)


def predict(
    run_dir: Path,
    source: str,
    out: Path,
    round: int | None = None,
    *,
    emit: Callable[[str], None],
    show: Show = lambda record: None,
    best: bool = False,
) -> dict[str, Any]:
    """Write the cluster of every image of `source` to `out`, and return what was counted.

    Rows are ordered as those of `assignments`. Columns beside its own:

        distance   squared L2 to the centroid in the whitened space, or -log p of the cluster
        second     the second-best cluster
        margin     by how much its distance is larger
        class      its class, where the run has labels
        confidence the probability of the class, where a classifier gives it

    With `best` the weights are those of the best checkpoint (`train.evaluate`).

    Of a method without clusters these are the classes. Raises `RecipeError` for a run without
    clusters and labels or another suffix, `DataError` for no images.
    """
    check_suffix(out)
    run, place = open_run(run_dir), target_of(out).parent
    labeller = best_labeller_of(run, emit) if best else labeller_of(run, round, emit)
    with tempfile.TemporaryDirectory(dir=place, prefix=".deepclust-") as scratch:
        index = open_given(source, run.recipe.data, Path(scratch) / "index")
        names = namer_of(run, labeller, emit)
        asked = _ask(labeller, names, index, run.recipe.data, Path(scratch), show)
        table = _Table(*asked, index, _moved(run, labeller, index))
        write_table(out, table.schema, table.batches())
    facts: dict[str, Any] = {"images": len(index), "excluded": len(asked[0].made.reasons)}
    used = int(np.count_nonzero(table.sizes))
    unit = "classes" if isinstance(labeller.embedder.method, NearestMean) else "clusters"
    facts |= {"k": labeller.rule.k, "used": used, "unit": unit}
    return {**facts, "round": labeller.round, "out": str(out)}


def way_of(labeller: Labeller) -> Way:
    """Return how images become the rows that a labeller is asked with."""
    embedder, projection = labeller.embedder, labeller.projection
    if projection is None:  # logits, as they are
        return Way(embedder.answered, labeller.rule.k, embedder.device, dtype=torch.float32)
    return Way(
        embedder.clustered, labeller.dim, embedder.device,
        projection.pivot, projection.whitening, projection.unit,
    )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """A labeller, and the columns of the rows of all images that it is asked with."""

    labeller: Labeller
    made: Rows
    columns: slice = field(default_factory=lambda: slice(None))

    def labels(self, part: Part, head: int = 0) -> Labels:
        """Return the labels of one shard's images; those of rows of zeros mean nothing."""
        rows = self.made.rows[part.first : part.last, self.columns]
        return label(self.labeller.rule, rows, head)

    def absent(self, part: Part) -> np.ndarray:
        """Return which of one shard's images have no row."""
        return np.isin(part.sample_ids, self._absent)

    @cached_property
    def _absent(self) -> np.ndarray:
        return np.array(sorted(self.made.reasons), np.int64)


def _ask(
    labeller: Labeller, namer: Labeller | None, index: Index, data: Data, scratch: Path, show: Show
) -> tuple[_Asked, _Asked | None]:
    """Return a labeller with its rows, and what names the images by class, with its own.

    Logits of both are of one pass over the images.
    """
    way = way_of(labeller)
    if namer is None or namer is labeller:
        asked = _Asked(labeller, rows_of(scratch, index, data, way, show))
        return asked, None if namer is None else asked
    if labeller.projection is not None:
        asked = _Asked(labeller, rows_of(scratch, index, data, way, show))
        made = rows_of(scratch / "classes", index, data, way_of(namer), show)
        return asked, _Asked(namer, made)
    embedder, other = labeller.embedder, namer.embedder.method
    both = replace(
        way, embed=lambda images: embedder.answered(images, other), dim=way.dim + namer.rule.k
    )
    made = rows_of(scratch, index, data, both, show)
    return _Asked(labeller, made, slice(way.dim)), _Asked(namer, made, slice(way.dim, None))


@dataclass(frozen=True)
class _Moved:
    """Samples of one head that a round has put elsewhere than their rows say, ids ascending."""

    sample_ids: np.ndarray
    clusters: np.ndarray
    distances: np.ndarray

    def put(self, labels: Labels, first: int) -> None:
        """Give those samples their clusters.

        What their rows say is second-best, and is nearer.
        """
        a, b = np.searchsorted(self.sample_ids, [first, first + len(labels.clusters)])
        at = self.sample_ids[a:b] - first
        labels.seconds[at] = labels.clusters[at]
        labels.margins[at] = labels.distances[at] - self.distances[a:b]
        labels.clusters[at], labels.distances[at] = self.clusters[a:b], self.distances[a:b]


def _moved(run: Run, labeller: Labeller, index: Index) -> list[_Moved]:
    """Return what each head of a round has moved, if these are the images of the run."""
    if labeller.round is None:
        return []
    stage = run.round(labeller.round) / "assignments"
    if manifest(stage)["inputs"].get("data") != index.fingerprint:
        return []
    if not has_file(stage, "moved.npy"):
        return []
    moved = np.array(read_array(stage, "moved.npy", dims=2))
    clusters = read_assignments(run, labeller.round)
    distances = read_array(stage, "distances.npy", dims=2)
    per_head = [np.sort(moved[moved[:, 0] == head, 1]) for head in range(labeller.rule.heads)]
    if any(len(ids) and not 0 <= ids[0] <= ids[-1] < len(index) for ids in per_head):
        raise DataError(f"{stage / 'moved.npy'} names samples that the run does not have")
    return [_Moved(ids, clusters[h, ids], distances[h, ids]) for h, ids in enumerate(per_head)]


@dataclass
class _Table:
    """The rows of the table, made shard by shard."""

    asked: _Asked
    names: _Asked | None
    index: Index
    moved: list[_Moved]
    sizes: np.ndarray = field(init=False)  # images of each cluster, of head 0

    def __post_init__(self) -> None:
        self.sizes = np.zeros(self.asked.labeller.rule.k, np.int64)

    @property
    def schema(self) -> pa.Schema:
        """The columns, with classes and paths where they are known."""
        schema = SCHEMA
        if self.names is not None:
            schema = schema.append(pa.field("class", pa.string()))
            if isinstance(self.names.labeller.rule, Answers):
                schema = schema.append(pa.field("confidence", pa.float32()))
        return schema.append(PATH) if has_paths(self.index) else schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield one batch for each shard and head."""
        for part in parts_of(self.index):
            for head in range(self.asked.labeller.rule.heads):
                yield self._batch(part, head)

    def _batch(self, part: Part, head: int) -> pa.RecordBatch:
        labels, absent = self.asked.labels(part, head), self.asked.absent(part)
        if self.moved:
            self.moved[head].put(labels, part.first)
        labels.clusters[absent] = labels.seconds[absent] = -1
        if head == 0:
            self.sizes += np.bincount(labels.clusters[~absent], minlength=len(self.sizes))
        count = len(absent)
        alone = absent | (labels.seconds < 0)
        columns = [
            pa.array(part.sample_ids), pa.repeat(part.shard, count),
            part.keys,
            pa.repeat(pa.scalar(head, pa.int32()), count), pa.array(labels.clusters),
            pa.array(labels.distances, mask=absent), pa.array(labels.seconds, mask=alone),
            pa.array(labels.margins, mask=alone),
            part.reasons(self.asked.made.reasons, absent, UNREAD),
            *self._classes(part, labels),
        ]  # fmt: skip
        if part.paths is not None:
            columns.append(part.paths)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _classes(self, part: Part, labels: Labels) -> list[pa.Array]:
        """Return the columns of classes, of one shard's clusters or by class means."""
        if self.names is None:
            return []
        if self.names is not self.asked:
            labels = self.names.labels(part)
            labels.clusters[self.names.absent(part)] = -1
        names, sure = self.names.labeller.named(labels)
        columns = [pa.array(names, pa.string())]
        if sure is not None:
            columns.append(pa.array(sure, mask=np.isnan(sure)))
        return columns
