"""Projection: raw rows of a round to the features that are clustered, [n, d] fp16 by sample id.

They are whitened unit rows, or raw unit rows where the method's rounds are not whitened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16

from deepclust.clustering.points import unit_rows
from deepclust.clustering.whiten import Whitening
from deepclust.run.directory import is_done
from deepclust.stages import raw_chunk
from deepclust.stages.extract import ExtractContext, chunk_ranges, read_chunk_exclusions

SLICE = 2**13  # rows that are whitened at a time


def project(context: ExtractContext, whitening: Whitening | None) -> None:
    """Project the raw rows into `features/rows.npy`, in sample order, each rank its chunks."""
    features_dir = context.raw_dir.parent / "features"
    if is_done(features_dir):
        return
    chunks = chunk_ranges(context.index.bases)
    pivot = raw_chunk.read_pivot(context.raw_dir)
    dim = len(pivot) if whitening is None else whitening.matrix.shape[1]
    if context.world.is_first:
        shape = (len(context.index), dim)
        np.lib.format.open_memmap(context.rows_path, "w+", np.float16, shape).flush()
    context.world.barrier()
    start, progress = np.load(context.rows_path, mmap_mode="r").offset, context.progress("project")
    for number in context.draw("project", list(range(len(chunks)))):
        for place, rows in _projected(context, number, chunks[number].start, whitening):
            offset = start + (chunks[number].start + place) * dim * 2
            _write_at(context.rows_path, offset, rows)
            context.report.alive()
        progress.show(number + 1, len(chunks))
    context.finish_together()
    if context.world.is_first:
        _finish_features(context, features_dir, dim)
    context.world.barrier()


def _projected(
    context: ExtractContext, number: int, first: int, whitening: Whitening | None
) -> Iterator[tuple[int, Float16[np.ndarray, "m d"]]]:
    """Yield a chunk's projected rows, a slice at a time, each with its place in the chunk."""
    device = context.world.device
    normalise = unit_rows if whitening is None else whitening
    with raw_chunk.opened(context.chunk_path(number), context.report.alive) as tensors:
        rows, pivot = tensors.get_slice("rows"), tensors.get_tensor("pivot").to(device)
        excluded = np.array([int(s) for s in json.loads(tensors.metadata()["excluded"])], np.int64)
        for place in range(0, rows.get_shape()[0], SLICE):
            raw = rows[place : place + SLICE].to(device).float() + pivot
            projected = normalise(raw).half().cpu()
            inside = excluded - first - place
            projected[inside[(inside >= 0) & (inside < len(projected))]] = 0
            yield place, np.asarray(projected.numpy())


def _write_at(path: Path, offset: int, rows: np.ndarray) -> None:
    left = memoryview(rows.tobytes())
    handle = os.open(path, os.O_WRONLY)
    try:
        while left:  # a disk that is nearly full writes less than it is asked to
            written = os.pwrite(handle, left, offset)
            left, offset = left[written:], offset + written
    finally:
        os.close(handle)


def _finish_features(context: ExtractContext, features_dir: Path, dim: int) -> None:
    excluded = read_chunk_exclusions(context.raw_dir)

    def fill(folder: Path) -> None:
        os.replace(context.rows_path, folder / "rows.npy")
        columns = {
            "sample_id": pa.array(list(excluded), pa.int64()),
            "reason": pa.array(list(excluded.values()), pa.string()),
        }
        pq.write_table(pa.table(columns), folder / "excluded.parquet")

    inputs = {"data": context.index.fingerprint, "round": context.round}
    context.run.commit(features_dir, fill, inputs, n=len(context.index), dim=int(dim))
    context.report.event("features", round=context.round)
