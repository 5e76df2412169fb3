"""Which image is in which cluster: a round's assignments as one Parquet or CSV table.

A method that answers with clusters and has no rounds is asked when the table is written, with the
weights of its newest checkpoint (`answers.py`). Every sample of the index has one row for each
head: an excluded one has cluster -1 and the reason. The table is written shard by shard, so it
needs no more memory than one shard does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

from cluster_jobs.results.answers import ask, open_trained
from cluster_jobs.results.samples import PATH, Part, has_paths, parts_of
from cluster_jobs.results.shards import open_own
from cluster_jobs.results.tables import check_suffix, write_table
from deepclust.data.shards.find import described
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.files import target_of
from deepclust.run.directory import Run, manifest, open_run
from deepclust.run.round_files import (
    read_array,
    read_assignments,
    read_excluded,
)
from deepclust.trained.trained_run import NO_ROUNDS, choose_round, seeded_classes

SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "shard": pa.string(),
        "key": pa.string(),
        "head": pa.int32(),
        "cluster": pa.int32(),
        "distance": pa.float32(),
        "reason": pa.string(),
    }
)
SEEDED = SCHEMA.append(pa.field("class", pa.string()))
log = logging.getLogger("deepclust")
REASON_LOST = "not in the round that these assignments were taken over from"


@dataclass(frozen=True)
class Clusters:
    """What the table says of every sample, in sample order."""

    assignments: Int32[np.ndarray, "heads n"]  # -1: excluded
    distances: Float32[np.ndarray, "heads n"] | None
    reasons: dict[int, str]  # of excluded samples
    classes: np.ndarray | None  # of each cluster [k + 1]


def export_assignments(
    run_dir: Path,
    out: Path,
    round: int | None = None,
    *,
    remote: bool = False,
    emit: Callable[[str], None] = log.warning,
) -> Path:
    """Write the assignments of a round (default: the last) to `out` atomically, and return it.

    The run may be somebody else's, so shards behind a URL are not asked for unless `remote` says
    so. The index that the run has kept names their samples.

    A method without rounds may answer itself. Then the clusters are the argmax of its answers for
    centre crops. Images are read again, and `emit` is given what is odd about the checkpoint.

    Rows are ordered by shard, then head, then sample id. What does not apply is null. Columns:

        sample_id, shard   shard is a file name
        key, head
        cluster            -1 for excluded samples
        distance           squared L2 to the own centroid, in the whitened space (of rounds only)
        reason             why a sample is excluded
        class              of the cluster's prototype (seeded rounds, methods that know classes)
        path               of the image file (loose files, and shards that `pack` has written)

    In a .csv file, texts are changed where a spreadsheet would run them (`safe_cells`). A .parquet
    file has them as they are.

    Raises `RecipeError` for another suffix than .parquet and .csv, or for a missing round. Raises
    `RunDiffersError` when the shards are no longer those that were clustered.
    """
    out = Path(out)
    check_suffix(out)
    target_of(out)  # an error here comes before images are read
    with clustered(open_run(run_dir), round, remote, emit) as (index, clusters):
        schema = SCHEMA if clusters.classes is None else SEEDED
        schema = schema.append(PATH) if has_paths(index) else schema
        write_table(out, schema, _batches(clusters, index))
    return out


@contextlib.contextmanager
def clustered(
    run: Run, round: int | None, remote: bool, emit: Callable[[str], None]
) -> Iterator[tuple[Index, Clusters]]:
    """Yield the index of a run, and the clusters of a round or of the method's own answers."""
    if run.recipe.cluster is None and run.recipe.assigns:
        if round is not None:
            raise RecipeError(NO_ROUNDS.format(run.path, run.recipe.method.name))
        with open_trained(run, remote=remote) as index:
            answers = ask(run, index, emit)
            clusters = answers.clusters[None]
            yield index, Clusters(clusters, None, answers.reasons, answers.classes)
        return
    number = choose_round(run, round)
    stage = run.round(number) / "assignments"
    with open_clustered(run, number, remote=remote) as index:
        yield (
            index,
            Clusters(
                read_assignments(run, number),
                read_array(stage, "distances.npy", dims=2),
                exclusions(run, number, index),
                seeded_classes(run, number),
            ),
        )


@contextlib.contextmanager
def open_clustered(
    run: Run, number: int, *, only_read: bool = False, remote: bool = True
) -> Iterator[Index]:
    """Yield the index of the run's shards (`only_read`, `remote`: see `open_own`).

    Raises `RunDiffersError` if round `number` had others.
    """
    with open_own(run, only_read=only_read, remote=remote) as index:
        clustered = manifest(run.round(number) / "assignments")["inputs"]["data"]
        if index.fingerprint != clustered:
            raise RunDiffersError(
                f"{described(run.recipe.data.shards)} now has fingerprint {index.fingerprint}, but "
                f"round {number} of {run.path} clustered {clustered}: the ids no longer name the "
                "same images. Put the shards of the run back in that folder."
            )
        yield index


def exclusions(run: Run, number: int, index: Index) -> dict[int, str]:
    """Return why samples have no cluster, by sample id, as index and extraction recorded it."""
    return {**read_excluded(run.round(number) / "assignments"), **index.excluded}


def _batches(known: Clusters, index: Index) -> Iterator[pa.RecordBatch]:
    classes = known.classes
    for part in parts_of(index):
        for head in range(len(known.assignments)):
            clusters = known.assignments[head, part.first : part.last]
            squared = None
            if known.distances is not None:
                squared = known.distances[head, part.first : part.last]
            batch = _batch(part, head, clusters, squared, known.reasons)
            if classes is not None:
                batch = batch.append_column("class", pa.array(classes[clusters], pa.string()))
            yield batch if part.paths is None else batch.append_column(PATH, part.paths)


def _batch(
    part: Part,
    head: int,
    clusters: Int32[np.ndarray, " m"],
    distances: Float32[np.ndarray, " m"] | None,
    reasons: dict[int, str],
) -> pa.RecordBatch:
    """Return one shard's rows of one head."""
    count = len(clusters)
    excluded = clusters < 0
    columns = [
        pa.array(part.sample_ids),
        pa.repeat(part.shard, count),
        part.keys,
        pa.repeat(pa.scalar(head, pa.int32()), count),
        pa.array(clusters),
        pa.nulls(count, pa.float32()) if distances is None else pa.array(distances, mask=excluded),
        part.reasons(reasons, excluded, REASON_LOST),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
