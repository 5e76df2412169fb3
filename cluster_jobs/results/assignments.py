"""Which image is in which cluster: a round's assignments as one Parquet or CSV table.

Every sample of the index has a row a head: the excluded ones with cluster -1 and the reason. The
table is written shard by shard, so that a hundred million rows need no more memory than a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Float32, Int32

from deepclust.data.shards.index import Index, open_index
from deepclust.data.shards.url import redact
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.files import atomic_file, read_json
from deepclust.run.directory import Run, manifest, open_run
from deepclust.run.round_files import read_excluded

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
Writer: TypeAlias = pyarrow.parquet.ParquetWriter | pyarrow.csv.CSVWriter
WRITERS = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}
REASON_LOST = "not in the round that these assignments were taken over from"


def export_assignments(run: Path, out: Path, round: int | None = None) -> Path:
    """Write the assignments of a round (default: the last) to `out`, atomically; returns `out`.

    Columns: sample_id, shard (file name), key, head, cluster (-1 = excluded), distance (squared L2
    to the own centroid in the whitened space, null if excluded), reason (null unless excluded); in
    a round with labelled seeds also class (of the cluster's prototype, null for free clusters).
    Rows are ordered by shard, then head, then sample id.

    Raises `RecipeError` for a suffix other than .parquet and .csv or a round that is not there,
    `RunDiffersError` when the shards are no longer those that were clustered.
    """
    out = Path(out)
    if out.suffix not in WRITERS:
        raise RecipeError(f"cannot write {out}: name it {' or '.join('*' + s for s in WRITERS)}")
    found = open_run(run)
    number = choose_round(found, round)
    index = open_clustered(found, number)
    schema = SCHEMA if seeded_classes(found, number) is None else SEEDED
    with atomic_file(out) as partial, WRITERS[out.suffix](partial, schema) as writer:
        for batch in _batches(found, number, index):
            writer.write_batch(batch)
    return out


def choose_round(run: Run, wanted: int | None) -> int:
    """The wanted round, or the last one; `RecipeError` lists those there are, if there can be."""
    rounds, recipe = run.rounds(), run.recipe
    if recipe.cluster is None:
        raise RecipeError(
            f"{run.path} is a run of method {recipe.method.name}, which has no clusters. What it "
            f"has is a backbone: deepclust export {run.path} --out backbone.safetensors"
        )
    if not rounds:
        raise RecipeError(
            f"{run.path} has no finished round yet. Continue it: deepclust resume {run.path}"
        )
    if wanted is not None and wanted not in rounds:
        there = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        raise RecipeError(f"{run.path} has no round {wanted}; there are {len(rounds)}: {there}")
    return rounds[-1] if wanted is None else wanted


def open_clustered(run: Run, number: int) -> Index:
    """The index of the run's shards; `RunDiffersError` if round `number` clustered other ones."""
    data = run.recipe.data
    index = open_index(data.shards, data.index, run.path)
    clustered = manifest(run.round(number) / "assignments")["inputs"]["data"]
    if index.fingerprint != clustered:
        raise RunDiffersError(
            f"{redact(data.shards)} now has fingerprint {index.fingerprint}, but round {number} of "
            f"{run.path} clustered {clustered}: the ids no longer name the same images. "
            "Put the shards of the run back in their place."
        )
    return index


def exclusions(run: Run, number: int, index: Index) -> dict[int, str]:
    """Why samples have no cluster, by sample id: known to the index, or found by extraction."""
    return {**read_excluded(run.round(number) / "assignments"), **index.excluded}


def seeded_classes(run: Run, number: int) -> np.ndarray | None:
    """Every cluster's class name, None for free ones and at the end for excluded samples (-1).

    None for a round without seeds.
    """
    file = run.round(number) / "centroids" / "prototypes.json"
    if not file.exists():
        return None
    cluster = run.recipe.clustering
    each = cluster.k // cluster.supers if run.recipe.method.name == "deepercluster" else 1
    names = np.full(cluster.k + 1, None, dtype=object)
    for one in read_json(file)["clusters"]:  # of super-clusters, where there are two levels
        names[one["cluster"] * each : (one["cluster"] + 1) * each] = one["class"]
    return names


def _batches(run: Run, number: int, index: Index) -> Iterator[pa.RecordBatch]:
    stage = run.round(number) / "assignments"
    assignments = np.load(stage / "assignments.npy", mmap_mode="r")
    distances = np.load(stage / "distances.npy", mmap_mode="r")
    reasons = exclusions(run, number, index)
    keys, classes = iter(index.keys), seeded_classes(run, number)
    for shard, path in enumerate(index.shards):
        first, last = index.bases[shard : shard + 2].tolist()
        names = list(islice(keys, last - first))
        for head in range(len(assignments)):
            clusters, squared = assignments[head, first:last], distances[head, first:last]
            batch = _batch(first, path.name, names, head, clusters, squared, reasons)
            if classes is not None:
                batch = batch.append_column("class", pa.array(classes[clusters], pa.string()))
            yield batch


def _batch(
    first: int,
    shard: str,
    keys: list[str],
    head: int,
    clusters: Int32[np.ndarray, " m"],
    distances: Float32[np.ndarray, " m"],
    reasons: dict[int, str],
) -> pa.RecordBatch:
    """One shard's rows of one head."""
    count = len(clusters)
    excluded = clusters < 0
    told = np.full(count, None, dtype=object)
    for place in np.flatnonzero(excluded):
        told[place] = reasons.get(first + int(place), REASON_LOST)
    columns = [
        pa.array(np.arange(first, first + count)),
        pa.repeat(shard, count),
        pa.array(keys, pa.string()),
        pa.repeat(pa.scalar(head, pa.int32()), count),
        pa.array(clusters),
        pa.array(distances, mask=excluded),
        pa.array(told, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
