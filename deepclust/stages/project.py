"""Projection: raw rows of a round to the features that are clustered, [n, d] fp16 by sample id.

They are whitened unit rows. Where the method's rounds are not whitened they are raw, and scaled to
length 1 unless the round asks for rows as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from deepclust.clustering.points import unit_rows
from deepclust.clustering.whiten import Whitening
from deepclust.files import write_tensors
from deepclust.run import decoder
from deepclust.run.directory import Hashes, is_done
from deepclust.stages import raw_chunk
from deepclust.stages.extract import ExtractContext, chunk_ranges, read_chunk_exclusions
from deepclust.stages.shared_rows import SharedRows

SCORER = "scorer.safetensors"
SLICE = 2**13  # rows that are whitened at a time


def project(
    context: ExtractContext,
    whitening: Whitening | None,
    unit: bool = True,
    scorer: dict[str, Tensor] | None = None,
) -> None:
    """Project the raw rows into `features/rows.npy`, in sample order, each rank its chunks.

    Without a whitening they are only scaled to length 1, or with `unit=False` not even that. The
    weights of a `scorer` (`Method.scorer`) are written beside them, for the process that clusters.
    """
    features_dir = context.raw_dir.parent / "features"
    if is_done(features_dir):
        return
    chunks = chunk_ranges(context.index.bases)
    pivot = raw_chunk.read_pivot(context.raw_dir)
    normalise = (unit_rows if unit else _as_they_are) if whitening is None else whitening
    dim = len(pivot) if whitening is None else whitening.matrix.shape[1]
    dtype = torch.zeros(0, dtype=context.dtype).numpy().dtype
    shared = SharedRows(context.rows_path, context.run, context.world.rank)
    if context.world.is_first:
        shared.create(len(context.index), int(dim), dtype)
    context.world.barrier()
    shared.open()
    progress = context.progress("project")
    for number in _drawn(context, len(chunks)):
        part = shared.stretch(chunks[number].start)
        for rows in _projected(context, number, chunks[number].start, normalise):
            part.add(rows)
        part.end()
        progress.show(number + 1, len(chunks))
    shared.finish()
    context.finish_together()
    if context.world.is_first:
        _finish_features(context, features_dir, shared, int(dim), scorer)
    context.world.barrier()


def _drawn(context: ExtractContext, count: int) -> Iterator[int]:
    """Yield the chunks that this rank projects: those in its memory, and some of those on disk."""
    if context.memory is None:
        yield from context.draw("project", list(range(count)))
        return
    on_disk = [n for n in range(count) if raw_chunk.has_rows(context.chunk_path(n))]
    held = sorted(context.memory.rows)
    everywhere = int(context.world.all_reduce(torch.tensor(len(held), device=context.world.device)))
    assert everywhere + len(on_disk) == count, "rows that nobody holds"
    for number in held:
        if context.stopping():
            return
        yield number
    yield from context.draw("project", on_disk)


def _projected(
    context: ExtractContext, number: int, first: int, normalise: Callable[[Tensor], Tensor]
) -> Iterator[Float[np.ndarray, "m d"]]:
    """Yield a chunk's projected rows, a slice at a time."""
    device = context.world.device
    with raw_chunk.opened(context.chunk_path(number), context.report.alive) as tensors:
        pivot = tensors.get_tensor("pivot").to(device)
        excluded = np.array([int(s) for s in json.loads(tensors.metadata()["excluded"])], np.int64)
        held = {} if context.memory is None else context.memory.rows
        rows = held.pop(number) if number in held else tensors.get_slice("rows")
        count = len(rows) if isinstance(rows, Tensor) else rows.get_shape()[0]
        for place in range(0, count, SLICE):
            raw = rows[place : place + SLICE].to(device).float() + pivot
            projected = normalise(raw).to(context.dtype).cpu()
            inside = excluded - first - place
            projected[inside[(inside >= 0) & (inside < len(projected))]] = 0
            yield np.asarray(projected.numpy())


def write_no_rows(context: ExtractContext) -> None:
    """Write the features of a round that needs none: only which samples the index excludes."""
    features_dir = context.raw_dir.parent / "features"
    if context.world.is_first and not is_done(features_dir):
        commit_features(context, features_dir, context.index.excluded, lambda folder: None, dim=0)
    context.world.barrier()


def _finish_features(
    context: ExtractContext,
    features_dir: Path,
    shared: SharedRows,
    dim: int,
    scorer: dict[str, Tensor] | None,
) -> None:
    def move(folder: Path) -> None:
        os.replace(context.rows_path, folder / "rows.npy")
        if scorer is not None:
            tensors = {name: tensor.detach().float().cpu() for name, tensor in scorer.items()}
            write_tensors(folder / SCORER, tensors)

    excluded = read_chunk_exclusions(context.raw_dir, context.run.alive)
    hashes: Hashes = {"rows.npy": shared.all_parts(context.world.size)}
    commit_features(context, features_dir, excluded, move, hashes, dim=dim)


def commit_features(
    context: ExtractContext,
    features_dir: Path,
    excluded: dict[int, str],
    move: Callable[[Path], None],
    hashes: Hashes | None = None,
    **facts: Any,
) -> None:
    """Publish a round's features: what `move` puts there, and which samples have no row.

    `hashes` are those that are known already (`Run.commit`).
    """

    def fill(folder: Path) -> None:
        move(folder)
        columns = {
            "sample_id": pa.array(list(excluded), pa.int64()),
            "reason": pa.array(list(excluded.values()), pa.string()),
        }
        pq.write_table(pa.table(columns), folder / "excluded.parquet")

    inputs = {"data": context.index.fingerprint, "round": context.round, **_decoded_by(context)}
    context.run.commit(features_dir, fill, inputs, hashes=hashes, n=len(context.index), **facts)
    context.report.event("features", round=context.round)


def _decoded_by(context: ExtractContext) -> dict[str, str]:
    """Return what decoded the images, where that was no CPU."""
    if context.config.decode == "cpu":
        return {}
    known = decoder.read(context.run)
    return {"decode": context.config.decode} | ({} if known is None else {"decoder": known.hash})


def _as_they_are(rows: Tensor) -> Tensor:
    return rows
