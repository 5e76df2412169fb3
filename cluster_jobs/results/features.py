"""Rows of any images by a trained network: the extraction of a round, in another folder.

It is the same code as in a run (`stages/extract.py`). Chunks that are there are not done again, and
nothing is in memory as a whole. Images that cannot be read have rows of zeros and a reason.

    FOLDER/raw/       chunks, until the rows are done
    FOLDER/features/  rows.npy [n, d] by sample id, excluded.parquet, manifest.json, DONE
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.whiten import Whitening
from deepclust.data.read.loader import Loader
from deepclust.data.shards.index import Index
from deepclust.errors import DataError
from deepclust.files import disk_errors
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run, is_done
from deepclust.run.reporting import DirectReport
from deepclust.run.round_files import read_array, read_excluded
from deepclust.stages import raw_chunk
from deepclust.stages.extract import ExtractContext, extract, extract_share
from deepclust.stages.project import project
from deepclust.world import World

FEW = 500  # images, which one process has read before others have begun
Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Way:
    """How images become rows: the network, the pivot that rows are rounded about, a whitening."""

    embed: Callable[[Tensor], Tensor]
    dim: int  # of what `embed` returns
    device: torch.device
    pivot: np.ndarray | None = None
    whitening: Whitening | None = None
    unit: bool = False
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True)
class Rows:
    """Rows by sample id, memory-mapped, and why some samples have none."""

    rows: np.ndarray
    reasons: dict[int, str]


class _Folder(Run):
    """A folder that an extraction writes to as to the one round of a run, without events."""

    def round(self, number: int) -> Path:
        """Return the folder itself."""
        return self.path

    def fence(self) -> None:
        """Nobody takes this folder over: its caller holds a lock of it."""

    def event(self, name: str, **fields: Any) -> None:
        """Keep no record."""


Helpers = Callable[[], AbstractContextManager[None]]


def rows_of(
    folder: Path, index: Index, data: Data, way: Way, show: Show,
    ranks: int = 1, helpers: Helpers = nullcontext,
) -> Rows:  # fmt: skip
    """Return the rows of all images of an index, made in `folder` unless they are there.

    `helpers` is entered while chunks are made: it starts the other ranks, each of which calls
    `fill_share`, and ends when they have ended. Raises `DataError` where no image can be read.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run = _Folder(folder)
    if not is_done(folder / "features"):
        _make(run, index, data, way, show, ranks, helpers)
    reasons = {**read_excluded(folder / "features"), **index.excluded}
    if len(reasons) >= len(index):
        first = next(iter(reasons.values()), "there are none")
        raise DataError(f"no image of {index.origin} can be read; the first: {first}")
    return Rows(read_array(folder / "features", "rows.npy", dims=2), reasons)


def fill_share(folder: Path, index: Index, data: Data, way: Way, rank: int, ranks: int) -> None:
    """Make the chunks of one rank in the folder of another one, which has begun."""
    with _context(_Folder(folder), index, data, way, lambda record: None, ranks) as context:
        extract_share(context, way.embed, rank, ranks)


def _make(
    run: _Folder, index: Index, data: Data, way: Way, show: Show, ranks: int, helpers: Helpers
) -> None:
    """Extract and project; what is there of the chunks is kept."""
    _write_pivot(run, way)
    with _context(run, index, data, way, show, ranks) as context:
        if ranks > 1 and not is_done(context.raw_dir):
            with helpers():
                extract_share(context, way.embed, 0, ranks)
        extract(context, way.embed)
        project(context, way.whitening, way.unit)
    shutil.rmtree(context.raw_dir, ignore_errors=True)


@contextmanager
def _context(
    run: _Folder, index: Index, data: Data, way: Way, show: Show, ranks: int
) -> Iterator[ExtractContext]:
    """Yield what an extraction needs, with its part of the readers."""
    data = data.model_copy(update={"max_bad": 1.0})  # nothing trains, and the reasons are written
    # perhaps another machine than that of the run: no more processes than cores beside this one
    cores = (os.cpu_count() or 1) // ranks
    workers = min(data.readers(), max(0, cores - 1) if len(index) > FEW else 0)
    loader = Loader(
        index, workers, max_pixels=data.max_pixels, decode=data.decode, device=way.device
    )
    try:
        yield ExtractContext(
            run, -1, World(device=way.device), index, loader, data, DirectReport(run, show),
            lambda: False, way.dtype, moments=False,
        )  # fmt: skip
    finally:
        loader.close()


def _write_pivot(run: _Folder, way: Way) -> None:
    """Write what rows are rounded about, which extraction would else choose from the images."""
    raw = run.path / "raw"
    with disk_errors(raw):
        raw.mkdir(exist_ok=True)
    if not (raw / "pivot.npy").exists():
        pivot = np.zeros(way.dim, np.float32) if way.pivot is None else way.pivot
        raw_chunk.write_pivot(raw, pivot, run.fence)
