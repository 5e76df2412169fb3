"""Near duplicates and outliers of a run, from the features of its last round that are on disk.

A near duplicate is an image whose features have a cosine of at least `similarity` with those of an
earlier image of its cluster. Pairs in different clusters are not compared: equal images are never
in two. Rows are sorted by cluster and compared tile by tile, each with those before it in its
cluster. So the memory is that of a tile, and the work that of the clusters' squares.

An outlier is an image whose distance from its centroid is more than `deviations` standard
deviations above the mean of its cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from cluster_jobs.results.assignments import open_clustered
from cluster_jobs.results.samples import PATH, has_paths, parts_of
from cluster_jobs.results.tables import check_suffix, write_table
from deepclust.clustering.points import unit_rows
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, RecipeError
from deepclust.files import target_of
from deepclust.run.directory import Run, has_file, is_done, open_run
from deepclust.run.round_files import read_array, read_assignments
from deepclust.trained.trained_run import choose_round

TILE = 2048  # rows compared with as many others at a time: 16 MB
ROUNDING = 1e-5  # of a cosine in float32
SCHEMA = pa.schema(
    {
        "sample_id": pa.int64(),
        "shard": pa.string(),
        "key": pa.string(),
        "cluster": pa.int32(),
        "kind": pa.string(),
        "of": pa.int64(),
        "similarity": pa.float32(),
        "group": pa.int64(),
        "deviations": pa.float32(),
    }
)


@dataclass(frozen=True)
class Duplicates:
    """For each sample the first earlier one that it nearly equals, -1 for none, and the cosine.

    `groups` is the first sample of all that are joined by such pairs, -1 for a sample alone.
    """

    of: Int64[np.ndarray, " n"]
    similarity: Float32[np.ndarray, " n"]
    groups: Int64[np.ndarray, " n"]


def write_duplicates(
    run_dir: Path,
    out: Path,
    similarity: float = 0.95,
    deviations: float = 4.0,
    round: int | None = None,
    *,
    emit: Callable[[str], None],
    show: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, int]:
    """Write a row for each near duplicate and each outlier, and return how many there are.

    Columns beside those of `assignments` are kind ("duplicate" or "outlier") and these. Of a
    duplicate: of, the earlier image, similarity, and group, the first image of those that are
    alike. Of an outlier: deviations.

    Raises `RecipeError` for numbers out of their range, and for a run without features on disk.
    """
    check_suffix(out)
    target_of(out)
    if not 0 < similarity <= 1 or not deviations > 0:
        raise RecipeError("--similarity is in (0, 1], and --deviations above 0")
    run = open_run(run_dir)
    number = choose_round(run, round)
    rows = kept_rows(run, number)
    clusters = np.asarray(read_assignments(run, number)[0])
    distances = read_array(run.round(number) / "assignments", "distances.npy", dims=2)[0]
    same = near_duplicates(rows, clusters, similarity, show)
    far = deviations_of(np.asarray(distances, np.float64), clusters)
    outliers = far > deviations
    with open_clustered(run, number, only_read=True) as index:
        schema = SCHEMA.append(PATH) if has_paths(index) else SCHEMA
        write_table(out, schema, _batches(index, clusters, same, np.where(outliers, far, np.nan)))
    several = int(np.count_nonzero(np.bincount(same.groups[same.groups >= 0]))) if len(rows) else 0
    counts = {"duplicates": int((same.of >= 0).sum()), "groups": several}
    return {"images": len(clusters), **counts, "outliers": int(outliers.sum()), "round": number}


def kept_rows(run: Run, number: int) -> np.ndarray:
    """Return the features of a round, memory-mapped, or raise `RecipeError` with a remedy."""
    stage = run.round(number) / "features"
    if not is_done(stage) or not has_file(stage, "rows.npy"):
        raise RecipeError(
            f"{run.path} has no features of round {number} on disk any more (keep.features), or "
            "its method makes none. Choose the last round, or start the run with keep.features=1"
        )
    rows = read_array(stage, "rows.npy", dims=2)
    if rows.shape[1] == 0:
        raise RecipeError(f"round {number} of {run.path} was made without features")
    return rows


def near_duplicates(
    rows: np.ndarray,
    clusters: Int32[np.ndarray, " n"],
    similarity: float,
    show: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Duplicates:
    """Return the near duplicates within each cluster (-1: left out)."""
    if len(rows) != len(clusters):
        raise DataError(f"there are {len(rows)} rows of features for {len(clusters)} samples")
    order = np.argsort(clusters, kind="stable")
    order = order[np.searchsorted(clusters[order], 0) :]
    of = np.full(len(rows), -1, np.int64)
    cosines = np.full(len(rows), np.nan, np.float32)
    sorted_ = clusters[order]
    starts = np.searchsorted(sorted_, sorted_, side="left")  # of the row's cluster
    for begin in range(0, len(order), TILE):
        end = min(begin + TILE, len(order))
        first, best = _first_alike(rows, order, starts, (begin, end), similarity)
        hit = first >= 0
        of[order[begin:end][hit]] = order[first[hit]]
        cosines[order[begin:end]] = best
        show({"progress": True, "stage": "compare", "done": end, "of": len(order)})
    return Duplicates(of, cosines, _groups(of))


def _first_alike(
    rows: np.ndarray,
    order: Int64[np.ndarray, " m"],
    starts: Int64[np.ndarray, " m"],
    block: tuple[int, int],
    similarity: float,
) -> tuple[Int64[np.ndarray, " b"], Float32[np.ndarray, " b"]]:
    """Return, for a block of sorted places, the first place of its cluster that is alike, or -1."""
    begin, end = block
    mine, places = _unit(rows, order[begin:end]), torch.arange(begin, end)
    low = torch.from_numpy(starts[begin:end])
    first = torch.full((end - begin,), -1, dtype=torch.int64)
    best = torch.full((end - begin,), torch.nan)
    for left in range(int(starts[begin]), end, TILE):
        right = min(left + TILE, end)
        others = torch.arange(left, right)
        cosine = mine @ _unit(rows, order[left:right]).T
        alike = (
            (cosine >= similarity - ROUNDING)
            & (others >= low[:, None])
            & (others < places[:, None])
        )
        at = alike.int().argmax(1)
        new = alike.any(1) & (first < 0)
        first[new] = left + at[new]
        best[new] = cosine.gather(1, at[:, None])[:, 0][new]
    return first.numpy(), best.numpy()


def _unit(rows: np.ndarray, ids: Int64[np.ndarray, " b"]) -> Float32[Tensor, "b d"]:
    return unit_rows(torch.from_numpy(np.asarray(rows[ids], np.float32)))


def _groups(of: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return the first sample of each chain of duplicates: chains go to lower ids only."""
    root = np.where(of < 0, np.arange(len(of)), of)
    while not np.array_equal(root, further := root[root]):
        root = further
    size = np.bincount(root, minlength=len(of))
    return np.where(size[root] > 1, root, -1)


def deviations_of(
    distances: np.ndarray, clusters: Int32[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """Return by how many standard deviations of its cluster each sample is too far; NaN: unknown.

    A cluster of fewer than 8 samples has no deviation that tells anything.
    """
    far = np.full(len(clusters), np.nan, np.float32)
    known = np.flatnonzero((clusters >= 0) & np.isfinite(distances))
    ids, values = clusters[known], distances[known]
    sizes = np.maximum(np.bincount(ids), 1)
    means = np.bincount(ids, values) / sizes
    squares = np.bincount(ids, (values - means[ids]) ** 2) / sizes
    usable = (sizes[ids] >= 8) & (squares[ids] > 0)
    far[known[usable]] = ((values - means[ids]) / np.sqrt(np.maximum(squares[ids], 1e-30)))[usable]
    return far


def _batches(
    index: Index, clusters: np.ndarray, same: Duplicates, far: Float32[np.ndarray, " n"]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of each shard: its duplicates, then its outliers."""
    for part in parts_of(index):
        for kind, chosen in (("duplicate", same.of >= 0), ("outlier", np.isfinite(far))):
            places = np.flatnonzero(chosen[part.first : part.last])
            if not len(places):
                continue
            ids, count = part.first + places, len(places)
            twice = kind == "duplicate"
            nothing = pa.nulls(count, pa.float32())
            columns = [
                pa.array(ids),
                pa.repeat(part.shard, count),
                part.keys.take(pa.array(places)),
                pa.array(clusters[ids]),
                pa.repeat(kind, count),
                pa.array(same.of[ids]) if twice else pa.nulls(count, pa.int64()),
                pa.array(same.similarity[ids]) if twice else nothing,
                pa.array(same.groups[ids]) if twice else pa.nulls(count, pa.int64()),
                nothing if twice else pa.array(far[ids]),
            ]
            names = SCHEMA
            if part.paths is not None:
                columns.append(part.paths.take(pa.array(places)))
                names = names.append(PATH)
            yield pa.RecordBatch.from_arrays(columns, schema=names)
