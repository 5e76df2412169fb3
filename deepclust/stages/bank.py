"""The features of a round from the method's bank: no image is read, and no network runs.

features/ has `rows.npy`, and `rows-1.npy` and so on for the further rows of a sample. A row that is
all zeros, or not finite, counts as none: its sample is excluded, like one whose image cannot be
read.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from deepclust.files import reading
from deepclust.methods.parts.bank import BLOCK, Bank
from deepclust.run.directory import is_done, whole_file
from deepclust.run.round_files import last_round_before, read_excluded
from deepclust.stages.extract import ExtractContext
from deepclust.stages.project import commit_features
from deepclust.stages.shared_rows import SharedRows


def fill_bank(context: ExtractContext, bank: Bank) -> None:
    """Take the features of the context's round into the bank, on every rank its own rows."""
    folder = context.raw_dir.parent / "features"
    if context.world.is_first:  # for all: the file is large
        whole_file(folder, "rows.npy", context.report.alive)
    context.world.barrier()
    with reading(folder / "rows.npy"):
        bank.fill(np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False))
    context.world.barrier()  # or rank 0 deletes the file, which other ranks still read


def write_bank(context: ExtractContext, bank: Bank) -> None:
    """Write the bank as the features of the context's round, each rank its own rows."""
    features_dir, world = context.raw_dir.parent / "features", context.world
    if world.broadcast_object(is_done(features_dir)):
        return
    parts, dim = bank.rows.shape[1:]
    paths = [
        context.rows_path.with_name(f"{part}-{context.rows_path.name}") for part in range(parts)
    ]
    files = [SharedRows(path, context.run, world.rank) for path in paths]
    if world.is_first:
        context.raw_dir.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.create(len(context.index), dim)
    world.barrier()
    empty = _write_own(context, bank, files)
    np.save(_empty_path(context, world.rank), empty)
    context.finish_together()
    if world.is_first:
        _finish(context, features_dir, files)
    world.barrier()


def _write_own(
    context: ExtractContext, bank: Bank, files: list[SharedRows]
) -> Int64[np.ndarray, " empty"]:
    """Write this rank's rows, and return the samples that have none."""
    first, count, empty = bank.range.start, bank.range.count, [np.zeros(0, np.int64)]
    progress = context.progress("project")
    stretches = [file.open().stretch(first) for file in files]
    for place in range(0, count, BLOCK):
        rows: Tensor = bank.rows[place : place + BLOCK].cpu()
        usable = (torch.isfinite(rows).all(2) & rows.any(2)).all(1)
        rows[~usable] = 0
        empty.append(first + place + (~usable).nonzero().flatten().numpy())
        for part, stretch in enumerate(stretches):
            stretch.add(rows[:, part].numpy())
        progress.show(min(place + BLOCK, count), count)
    for file, stretch in zip(files, stretches, strict=True):
        if count:
            stretch.end()
        file.finish()
    return np.concatenate(empty)


def _finish(context: ExtractContext, features_dir: Path, files: list[SharedRows]) -> None:
    """Commit the features, with the reasons that earlier rounds know for excluded samples."""
    ranks = range(context.world.size)
    empty = np.concatenate([np.load(_empty_path(context, rank)) for rank in ranks]).tolist()
    last = last_round_before(context.run, context.round)
    known = {} if last is None else read_excluded(context.run.round(last) / "assignments")
    known |= context.index.excluded
    reason = "no row of it is in the bank"
    excluded = {sample: known.get(sample, reason) for sample in empty}

    def move(folder: Path) -> None:
        for part, file in enumerate(files):
            os.replace(file.path, folder / _name(part))

    hashes = {_name(part): file.all_parts(context.world.size) for part, file in enumerate(files)}
    commit_features(context, features_dir, excluded, move, hashes, source="bank")


def _name(part: int) -> str:
    return f"rows-{part}.npy" if part else "rows.npy"


def _empty_path(context: ExtractContext, rank: int) -> Path:
    return context.raw_dir / f"empty-{context.run.token}-{rank}.npy"
