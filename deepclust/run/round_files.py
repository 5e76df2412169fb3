"""Readers of a round's folder: its exclusions, whitening and statistics, and the round before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32

from deepclust.clustering.whiten import Whitening
from deepclust.files import read_json
from deepclust.run.directory import Run, is_done


def read_excluded(stage: Path) -> dict[int, str]:
    """Return the sample ids without a feature row, and why.

    Features and assignments both have the list. Assignments of another run (`init.assignments`)
    have none: the result is then empty.
    """
    if not (stage / "excluded.parquet").exists():
        return {}
    table = pq.read_table(stage / "excluded.parquet")
    return dict(zip(*(table[name].to_pylist() for name in ("sample_id", "reason")), strict=True))


def read_whitening(round_dir: Path) -> Whitening:
    """Return the whitening of a round."""
    return Whitening.load(round_dir / "whitening" / "whitening.safetensors")


def find_whitening(round_dir: Path) -> Whitening | None:
    """Return the whitening of a round, or None where its features are not whitened."""
    return read_whitening(round_dir) if is_done(round_dir / "whitening") else None


def read_statistics(run: Run, number: int) -> dict[str, Any]:
    """Return the statistics of a finished round."""
    return dict(read_json(run.round(number) / "assignments" / "statistics.json"))


def read_kept(round_dir: Path) -> Bool[np.ndarray, "heads k"] | None:
    """Return which clusters continue one of the round before, or None where ids are not matched."""
    file = round_dir / "assignments" / "kept.npy"
    # rounds written before there were heads have one row without its axis
    return np.atleast_2d(np.load(file)) if file.exists() else None


def last_round_before(run: Run, number: int) -> int | None:
    """Return the finished round before this one, if there is one."""
    return max((r for r in run.rounds() if r < number), default=None)


def read_assignments(run: Run, number: int) -> Int32[np.ndarray, "heads n"]:
    """Return a finished round's assignments, memory-mapped."""
    file = run.round(number) / "assignments" / "assignments.npy"
    assignments: Int32[np.ndarray, "heads n"] = np.load(file, mmap_mode="r")
    return assignments
