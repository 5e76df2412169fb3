"""Readers of a round's folder: its exclusions, whitening and statistics, and the round before.

Each compares the file with the hash that was written for it. A file that is missing or has changed
is a `DataError` with its name. `resume` then makes the round again (stages/whole.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32

from deepclust.clustering.whiten import Whitening
from deepclust.files import read_json, reading
from deepclust.run.directory import Run, has_file, is_done, whole_file
from deepclust.run.signs import unwatched


def read_array(
    stage: Path, name: str, alive: Callable[[], None] = unwatched, dims: int | None = None
) -> np.ndarray:
    """Return an array of a stage, memory-mapped, as it was written."""
    file = whole_file(stage, name, alive)
    with reading(file):
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        if dims is not None and array.ndim != dims:
            raise ValueError(f"it has shape {array.shape}")
        return array


def read_facts(stage: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a stage, as it was written."""
    file = whole_file(stage, name)
    with reading(file):
        return dict(read_json(file))


def read_excluded(stage: Path) -> dict[int, str]:
    """Return the sample ids without a feature row, and why.

    Features and assignments both have the list. Assignments of another run (`init.assignments`)
    have none: the result is then empty.
    """
    if not has_file(stage, "excluded.parquet"):
        return {}
    file = whole_file(stage, "excluded.parquet")
    with reading(file):
        table = pq.read_table(file)
        columns = (table[name].to_pylist() for name in ("sample_id", "reason"))
        return dict(zip(*columns, strict=True))


def read_whitening(round_dir: Path) -> Whitening:
    """Return the whitening of a round."""
    file = whole_file(round_dir / "whitening", "whitening.safetensors")
    with reading(file):
        return Whitening.load(file)


def find_whitening(round_dir: Path) -> Whitening | None:
    """Return the whitening of a round, or None where its features are not whitened."""
    return read_whitening(round_dir) if is_done(round_dir / "whitening") else None


def read_statistics(run: Run, number: int) -> dict[str, Any]:
    """Return the statistics of a finished round."""
    return read_facts(run.round(number) / "assignments", "statistics.json")


def read_kept(round_dir: Path) -> Bool[np.ndarray, "heads k"] | None:
    """Return which clusters continue one of the round before, or None where ids are not matched."""
    stage = round_dir / "assignments"
    if not has_file(stage, "kept.npy"):
        return None
    # rounds written before there were heads have one row without its axis
    return np.atleast_2d(np.array(read_array(stage, "kept.npy")))


def last_round_before(run: Run, number: int) -> int | None:
    """Return the finished round before this one, if there is one."""
    return max((r for r in run.rounds() if r < number), default=None)


def read_assignments(run: Run, number: int) -> Int32[np.ndarray, "heads n"]:
    """Return a finished round's assignments, memory-mapped."""
    stage = run.round(number) / "assignments"
    return read_array(stage, "assignments.npy", run.alive, dims=2)
