"""Extraction: every image through the backbone, once a round, in fixed units.

A unit is a range of sample ids, the same whatever the world is. Ranks draw units from one queue;
a unit commits its rows and its moments together in one file, and one that is there is not done
again, so a killed pass continues and nothing depends on who did what. Rows wait as fp16 of
(feature - pivot) until the whitening is known; then ranks project them, and only [n, d] stays.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from torch import Tensor

from deepclust.clustering.whiten import Moments, Whitening
from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, NumericalError, RequeueWanted
from deepclust.files import atomic_file, write_json, write_tensors
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run, is_done
from deepclust.run.reporting import Report
from deepclust.world import World

UNITS = 64
SMALLEST_UNIT = 256
LARGEST_UNIT = 2**18  # 2 GB of float16 at D = 4096, which a rank holds at a time
SLICE = 2**13  # rows that are whitened at a time
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """What an extraction pass needs: where it writes, what it reads, and how images become rows."""

    run: Run
    round: int
    world: World
    index: Index
    loader: Loader
    config: Data
    report: Report
    stopping: Callable[[], bool]

    @property
    def raw(self) -> Path:
        """Scratch for unit files; deleted when the features are done."""
        return self.run.round(self.round) / "raw"

    @property
    def rows_file(self) -> Path:
        """Where projected rows gather; of this controller alone, so that no zombie spoils them."""
        return self.raw / f"rows-{self.run.token}.npy"

    def unit_file(self, number: int) -> Path:
        """Rows and moments of a unit."""
        return self.raw / f"unit-{number:05d}.safetensors"

    def draw(self, queue: str, numbers: list[int]) -> Iterator[int]:
        """Units from the queue that all ranks share, until it is empty or we are asked to stop."""
        while not self.stopping():
            ticket = self.world.ticket(f"{queue}-{self.round}")
            if ticket >= len(numbers):
                return
            yield numbers[ticket]

    def meet(self) -> None:
        """Wait for the other ranks; all stop when one was asked to."""
        if self.world.max_int(int(self.stopping())):
            raise RequeueWanted("stopped during extraction; finished units are kept")


@dataclass
class _Open:
    """A unit that is being filled."""

    rows: list[Float[Tensor, "b D"]] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    moments: Moments | None = None


def unit_ranges(bases: Int64[np.ndarray, " s1"]) -> list[range]:
    """Cut all sample ids into 64 units, at shard boundaries where there are enough.

    Fewer than 64 if they would be tiny, more if they would not fit into memory.
    """
    n = int(bases[-1])
    count = max(1, min(UNITS, n // SMALLEST_UNIT), -(-n // LARGEST_UNIT))
    cuts = np.linspace(0, n, count + 1).round().astype(np.int64)
    if len(bases) - 1 >= count:
        cuts = np.unique(bases[np.searchsorted(bases, cuts)])
    return [range(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def extract(job: Pass, embed: Embed) -> None:
    """Fill `raw/` with every unit's rows and moments, then mark it DONE."""
    if is_done(job.raw) or is_done(job.raw.parent / "features"):
        return
    units = unit_ranges(job.index.bases)
    if job.world.is_first:
        job.raw.mkdir(parents=True, exist_ok=True)
        _find_pivot(job, embed, units[0])
    job.world.barrier()
    pivot = torch.from_numpy(np.load(job.raw / "pivot.npy")).to(job.world.device)
    missing = [number for number in range(len(units)) if not job.unit_file(number).exists()]
    _fill(job, embed, units, job.world.broadcast_object(missing), pivot)
    job.meet()
    if job.world.is_first:
        _finish_raw(job, len(units))
    job.world.barrier()


def project(job: Pass, whitening: Whitening) -> None:
    """Whiten every rank's share of the raw rows into `features/rows.npy`, in sample order."""
    features = job.raw.parent / "features"
    if is_done(features):
        return
    units = unit_ranges(job.index.bases)
    rows_file = job.rows_file
    dim = whitening.matrix.shape[1]
    if job.world.is_first:
        shape = (len(job.index), dim)
        np.lib.format.open_memmap(rows_file, "w+", np.float16, shape).flush()
    job.world.barrier()
    start = np.load(rows_file, mmap_mode="r").offset
    for number in job.draw("project", list(range(len(units)))):
        first = units[number].start
        for place, rows in _projected(job, number, first, whitening):
            _write_at(rows_file, start + (first + place) * dim * 2, rows)
            job.report.alive()
    job.meet()
    if job.world.is_first:
        _finish_features(job, features, whitening)
    job.world.barrier()


def merged_moments(raw: Path) -> Moments:
    """All units' moments, added in unit order, so that the sum has one value only."""
    total: Moments | None = None
    for file in sorted(raw.glob("unit-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = ("pivot", "sum", "outer")
            count = int(tensors.get_tensor("count"))
            unit = Moments(count, *(tensors.get_tensor(name) for name in names))
        total = unit if total is None else total.merge(unit)
    assert total is not None
    return total


def read_excluded(stage: Path) -> dict[int, str]:
    """Sample ids without a feature row, and why; features and assignments both carry the list."""
    if not (stage / "excluded.parquet").exists():  # assignments taken over from another run
        return {}
    table = pq.read_table(stage / "excluded.parquet")
    return dict(zip(*(table[name].to_pylist() for name in ("sample_id", "reason")), strict=True))


def _find_pivot(job: Pass, embed: Embed, unit: range) -> None:
    """Mean of the first batch of unit 0: near the true mean, and the same on every restart."""
    if (job.raw / "pivot.npy").exists():
        return
    ids = np.arange(unit.start, min(unit.stop, unit.start + job.config.extract_batch))
    loaded = next(iter(job.loader.stream([_request(job.config, ids)])))
    rows = embed(loaded.images[0])
    usable = torch.isfinite(rows).all(1).cpu()
    usable[[int(b.sample_id) - unit.start for b in loaded.bad]] = False
    if len(loaded.bad) == len(ids):
        raise DataError(
            f"none of the first {len(ids)} images of {job.index.shards[0]} can be read; the first: "
            f"{loaded.bad[0].reason}"
        )
    if not usable.any():
        raise NumericalError(
            f"none of the first {len(ids)} images of {job.index.shards[0]} gives finite features; "
            "look at the images, or lower train.lr if this is not the first round"
        )
    pivot = job.raw / "pivot.npy"
    with atomic_file(pivot, job.run.fence) as partial, open(partial, "wb") as file:
        np.save(file, rows[usable].mean(0).cpu().numpy())


def _request(config: Data, sample_ids: Int64[np.ndarray, " b"], tag: int = 0) -> Request:
    crop = Crop(CentreCrop(config.size, config.short_side))
    return Request(sample_ids, positions=sample_ids, key=0, crops=(crop,), tag=tag)


def _fill(job: Pass, embed: Embed, units: list[range], missing: list[int], pivot: Tensor) -> None:
    step = job.config.extract_batch

    def requests() -> Iterator[Request]:
        for number in job.draw("extract", missing):
            unit = units[number]
            for start in range(unit.start, unit.stop, step):
                yield _request(job.config, np.arange(start, min(unit.stop, start + step)), number)

    batches = {n: -(-len(units[n]) // step) for n in missing}
    unit = _Open()
    for loaded in job.loader.stream(requests()):
        job.report.alive()
        number = loaded.tag
        _add_batch(unit, embed(loaded.images[0]).float(), loaded.sample_ids, loaded.bad, pivot)
        if len(unit.rows) == batches[number]:
            _commit_unit(job, number, unit, pivot)
            job.report.event("unit", round=job.round, unit=number, of=len(units))
            unit = _Open()


def _add_batch(
    unit: _Open, rows: Tensor, ids: Int64[np.ndarray, " b"], bad: list[Any], pivot: Tensor
) -> None:
    """Centre, round to fp16, and count what is usable; a row that is not becomes zeros."""
    centred = rows - pivot
    half = centred.half()
    usable = torch.isfinite(half).all(1)
    reasons = {int(item.sample_id): str(item.reason) for item in bad}
    broken = np.isin(ids, list(reasons))
    for sample in ids[~usable.cpu().numpy() & ~broken]:
        reasons[int(sample)] = f"sample {sample}: its feature is not finite, or too large for fp16"
    usable &= torch.from_numpy(~broken).to(usable.device)
    half[~usable] = 0
    if unit.moments is None:
        unit.moments = Moments.zero(pivot)
    unit.moments.add(rows[usable])
    unit.rows.append(half.cpu())
    unit.bad.update(reasons)


def _commit_unit(job: Pass, number: int, unit: _Open, pivot: Tensor) -> None:
    assert unit.moments is not None
    tensors = {
        "rows": torch.cat(unit.rows),
        "count": torch.tensor(unit.moments.count),
        "sum": unit.moments.sum,
        "outer": unit.moments.outer,
        "pivot": pivot,
    }
    with atomic_file(job.unit_file(number), job.run.fence) as partial:
        write_tensors(partial, tensors, {"excluded": json.dumps(unit.bad)})


def _excluded(raw: Path) -> dict[int, str]:
    excluded: dict[int, str] = {}
    for file in sorted(raw.glob("unit-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            reasons = json.loads(tensors.metadata()["excluded"])
        excluded.update({int(sample): reason for sample, reason in reasons.items()})
    return excluded


def _finish_raw(job: Pass, units: int) -> None:
    excluded = _excluded(job.raw)
    _check_bad(job, excluded)
    write_json(job.raw / "manifest.json", {"units": units, "excluded": len(excluded)})
    job.run.fence()
    (job.raw / "DONE").touch()
    job.report.event("extracted", round=job.round, units=units, excluded=len(excluded))


def _check_bad(job: Pass, excluded: dict[int, str]) -> None:
    if len(excluded) <= job.config.max_bad * len(job.index):
        return
    listed = "\n".join(f"  {reason}" for reason in list(excluded.values())[:20])
    raise DataError(
        f"{len(excluded)} of {len(job.index)} samples cannot be used, more than data.max_bad="
        f"{job.config.max_bad} allows. The first of them:\n{listed}\n"
        "Repair the shards, or raise data.max_bad."
    )


def _projected(
    job: Pass, number: int, first: int, whitening: Whitening
) -> Iterator[tuple[int, np.ndarray]]:
    """A unit's whitened rows, a slice at a time, each with its place in the unit."""
    device = job.world.device
    with safe_open(job.unit_file(number), "pt") as tensors:
        rows, pivot = tensors.get_slice("rows"), tensors.get_tensor("pivot").to(device)
        excluded = np.array([int(s) for s in json.loads(tensors.metadata()["excluded"])], np.int64)
        for place in range(0, rows.get_shape()[0], SLICE):
            white = whitening(rows[place : place + SLICE].to(device).float() + pivot).half().cpu()
            inside = excluded - first - place
            white[inside[(inside >= 0) & (inside < len(white))]] = 0
            yield place, np.asarray(white.numpy())


def _write_at(file: Path, offset: int, rows: np.ndarray) -> None:
    left = memoryview(rows.tobytes())
    handle = os.open(file, os.O_WRONLY)
    try:
        while left:  # a disk that is nearly full writes less than it is asked to
            written = os.pwrite(handle, left, offset)
            left, offset = left[written:], offset + written
    finally:
        os.close(handle)


def _finish_features(job: Pass, features: Path, whitening: Whitening) -> None:
    excluded = _excluded(job.raw)

    def fill(folder: Path) -> None:
        os.replace(job.rows_file, folder / "rows.npy")
        columns = {
            "sample_id": pa.array(list(excluded), pa.int64()),
            "reason": pa.array(list(excluded.values()), pa.string()),
        }
        pq.write_table(pa.table(columns), folder / "excluded.parquet")

    inputs = {"data": job.index.fingerprint, "round": job.round}
    job.run.commit(features, fill, inputs, n=len(job.index), dim=int(whitening.matrix.shape[1]))
    job.report.event("features", round=job.round)
