"""Which image is in which cluster: a round's assignments as one Parquet or CSV table.

A method that answers with clusters and has no rounds is asked when the table is written, with the
weights of its newest checkpoint (`answers.py`). Every sample of the index has one row for each
head: an excluded one has cluster -1 and the reason. The table is written shard by shard, so it
needs no more memory than one shard does.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Float32, Int32

from cluster_jobs.results.answers import ask, open_trained
from cluster_jobs.results.shards import open_own
from cluster_jobs.terminal import visible
from deepclust.data.loose.index import FileIndex
from deepclust.data.pack.names import storable
from deepclust.data.shards.find import described
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, RecipeError, RunDiffersError
from deepclust.files import atomic_file, target_of
from deepclust.run.directory import Run, has_file, manifest, open_run
from deepclust.run.round_files import (
    read_array,
    read_assignments,
    read_excluded,
    read_facts,
)

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
_PATH = pa.field("path", pa.string())
WRITERS = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")  # and the wide forms of Asian keyboards
log = logging.getLogger("deepclust")
REASON_LOST = "not in the round that these assignments were taken over from"


@dataclass(frozen=True)
class _Clusters:
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
        path               of the image file (where images are files of their own)

    In a .csv file, texts are changed where a spreadsheet would run them (`safe_cells`). A .parquet
    file has them as they are.

    Raises `RecipeError` for another suffix than .parquet and .csv, or for a missing round. Raises
    `RunDiffersError` when the shards are no longer those that were clustered.
    """
    out = Path(out)
    if out.suffix not in WRITERS:
        raise RecipeError(f"cannot write {out}: name it {' or '.join('*' + s for s in WRITERS)}")
    file = target_of(out)
    with _clustered(open_run(run_dir), round, remote, emit) as (index, clusters):
        schema = _with_paths(SCHEMA if clusters.classes is None else SEEDED, index)
        with atomic_file(file) as partial, WRITERS[out.suffix](partial, schema) as writer:
            for batch in _batches(clusters, index):
                writer.write_batch(batch if out.suffix != ".csv" else safe_cells(batch))
    return out


@contextlib.contextmanager
def _clustered(
    run: Run, round: int | None, remote: bool, emit: Callable[[str], None]
) -> Iterator[tuple[Index, _Clusters]]:
    """Yield the index of a run, and the clusters of a round or of the method's own answers."""
    if run.recipe.cluster is None and run.recipe.assigns:
        if round is not None:
            raise RecipeError(
                f"{run.path} is a run of method {run.recipe.method.name}, which has no rounds: its "
                "network answers with a cluster. Leave --round out"
            )
        with open_trained(run, remote=remote) as index:
            answers = ask(run, index, emit)
            clusters = answers.clusters[None]
            yield index, _Clusters(clusters, None, answers.reasons, answers.classes)
        return
    number = choose_round(run, round)
    stage = run.round(number) / "assignments"
    with open_clustered(run, number, remote=remote) as index:
        yield (
            index,
            _Clusters(
                read_assignments(run, number),
                read_array(stage, "distances.npy", dims=2),
                exclusions(run, number, index),
                seeded_classes(run, number),
            ),
        )


def safe_cells(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch whose texts no spreadsheet runs and no terminal obeys.

    A text that begins with = + - @ has an apostrophe before it. Control characters are written as
    Python writes them. Keys and classes come with the shards, which may be anybody's.
    """
    columns = [
        pa.array([text and _safe(text) for text in column.to_pylist()], pa.string())
        if pa.types.is_string(column.type)
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _safe(text: str) -> str:
    text = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return f"'{text}" if FORMULA.match(text) else text


def choose_round(run: Run, wanted: int | None) -> int:
    """Return the wanted round, or the last.

    `RecipeError` names the rounds that there are.
    """
    rounds, recipe = run.rounds(), run.recipe
    if recipe.cluster is None:
        raise RecipeError(
            f"{run.path} is a run of method {recipe.method.name}, which has no clusters. It has a "
            f"backbone: deepclust export {run.path} --out backbone.safetensors"
        )
    lost = run.lost_round()
    if wanted is None and lost is not None:
        raise DataError(
            f"round {lost} of {run.path} was clustered, and its files are missing or not whole: it "
            "has no DONE. Copy them back, or choose another round with --round"
        )
    if not rounds:
        raise RecipeError(
            f"{run.path} has no finished round yet. Continue it: deepclust resume {run.path}"
        )
    if wanted is not None and wanted not in rounds:
        there = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        raise RecipeError(f"{run.path} has no round {wanted}; there are {len(rounds)}: {there}")
    return rounds[-1] if wanted is None else wanted


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


def seeded_classes(run: Run, number: int) -> np.ndarray | None:
    """Return the class name of every cluster [k + 1], or None for a round without seeds.

    It is None for free clusters, and in the last place, which excluded samples (-1) index.
    """
    stage = run.round(number) / "centroids"
    if run.recipe.seeds is None or not has_file(stage, "prototypes.json"):
        return None
    k, supers = run.recipe.clustering.k, seeded_supers(run, number)
    each = 1 if supers is None else k // supers
    names = np.full(k + 1, None, dtype=object)
    # of super-clusters, where there are two levels
    for one in read_facts(stage, "prototypes.json")["clusters"]:
        names[one["cluster"] * each : (one["cluster"] + 1) * each] = one["class"]
    return names


def seeded_supers(run: Run, number: int) -> int | None:
    """Return the number of super-clusters of a two-level round, whose seeds are of those."""
    supers: int | None = manifest(run.round(number) / "assignments")["inputs"].get("supers")
    return supers


def _batches(known: _Clusters, index: Index) -> Iterator[pa.RecordBatch]:
    keys, classes = iter(index.keys), known.classes
    for shard, name in enumerate(index.names):
        first, last = index.bases[shard : shard + 2].tolist()
        names, paths = list(islice(keys, last - first)), _paths(index, first, last)
        for head in range(len(known.assignments)):
            clusters = known.assignments[head, first:last]
            squared = None if known.distances is None else known.distances[head, first:last]
            batch = _batch(first, name, names, head, clusters, squared, known.reasons)
            if classes is not None:
                batch = batch.append_column("class", pa.array(classes[clusters], pa.string()))
            yield batch if paths is None else batch.append_column("path", paths)


def _with_paths(schema: pa.Schema, index: Index) -> pa.Schema:
    return schema.append(_PATH) if isinstance(index, FileIndex) else schema


def _paths(index: Index, first: int, last: int) -> pa.Array | None:
    """Return the paths of image files as text, or None for shards."""
    if not isinstance(index, FileIndex):
        return None
    return pa.array([storable(str(path)) for path in index.paths[first:last]], pa.string())


def _batch(
    first: int,
    shard: str,
    keys: list[str],
    head: int,
    clusters: Int32[np.ndarray, " m"],
    distances: Float32[np.ndarray, " m"] | None,
    reasons: dict[int, str],
) -> pa.RecordBatch:
    """Return one shard's rows of one head."""
    count = len(clusters)
    excluded = clusters < 0
    why = np.full(count, None, dtype=object)
    for place in np.flatnonzero(excluded):
        why[place] = reasons.get(first + int(place), REASON_LOST)
    columns = [
        pa.array(np.arange(first, first + count)),
        pa.repeat(shard, count),
        pa.array(keys, pa.string()),
        pa.repeat(pa.scalar(head, pa.int32()), count),
        pa.array(clusters),
        pa.nulls(count, pa.float32()) if distances is None else pa.array(distances, mask=excluded),
        pa.array(why, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
