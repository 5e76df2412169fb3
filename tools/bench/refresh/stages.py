"""One refresh in this process, stage by stage, by the product's functions: seconds, memory, bytes.

Moments go unit by unit and batch by batch and merge in unit order, as extraction makes them; rows
are made again for the projection, where the product reads its unit files; `rows.npy` is a memory
map that counts what is read from it. Memory is RssAnon above its value after the imports.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import processes
import torch
from memory import Peak, anonymous
from stream import BLOCK, Stream

from deepclust.clustering import statistics
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.moments import Moments
from deepclust.clustering.nearest import half_is_faster
from deepclust.clustering.options import KMeansOptions
from deepclust.clustering.two_level import TwoLevel, two_level
from deepclust.clustering.whiten import Whitening, solve
from deepclust.files import write_json
from deepclust.stages.extract import chunk_ranges

BATCH = 256  # rows that moments get at once: the default of data.extract_batch
LEVELS = ("level one", "level two")
READS: list[tuple[float, int, float]] = []  # of the memory map: when, bytes, CPU s till then


class Counted(np.memmap):
    """A memory map that notes every read."""

    def __getitem__(self, where):
        """The rows, as a plain array."""
        piece = np.asarray(super().__getitem__(where))
        READS.append((time.monotonic(), piece.nbytes, time.process_time()))
        return piece


class Laps:
    """What each stage took."""

    def __init__(self, folder: Path, stream: Stream, device: torch.device) -> None:
        self.folder, self.stream, self.device, self.stages = folder, stream, device, []
        self.base = anonymous(os.getpid())

    @contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Measure what happens inside; the generator's time is taken off.

        CPU seconds above threads x seconds are not possible; far below, others had the machine.
        """
        lap: dict = {"stage": name}
        made, streamed, spent = self.stream.seconds, self.stream.bytes, self.stream.cpu
        files, reads = self._written(), len(READS)
        with Peak() as peak:
            began, cpu = time.perf_counter(), time.process_time()
            yield lap
            wait_for(self.device)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        lap["generator_s"] = self.stream.seconds - made
        lap["seconds"] = seconds - lap["generator_s"]
        lap["cpu_s"] = cpu - (self.stream.cpu - spent)
        lap["load_after"] = os.getloadavg()[0]
        lap["peak_bytes"] = peak.before + peak.bytes - self.base
        lap["streamed"] = self.stream.bytes - streamed
        lap["read"] = sum(size for _, size, _ in READS[reads:])
        lap["written"] = self._written() - files
        self.stages.append(lap)

    def _written(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir())


def wait_for(device: torch.device) -> None:
    """Let a GPU end what it was given: its operations return before they are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def refresh(job: dict) -> dict:
    """All stages, after a tiny one of each that is not counted."""
    stream, device = Stream(job["D"], job["seed"]), torch.device(job["device"])
    few = torch.rand(300, 8).to(device)
    solve(Moments.zero(few[0]).add(few), 4)(few)
    two_level(ArrayPoints(few.half()), 2, KMeansOptions(4, 1))
    with tempfile.TemporaryDirectory(dir=job["work"]) as name:
        laps = Laps(Path(name), stream, device)
        found, facts = run(job, laps)
    supers = np.bincount(found.supers, minlength=job["m"])
    return {
        **job, "stages": laps.stages, **facts, "base_bytes": laps.base,
        "super_shares": sorted((supers / job["n"]).tolist()),
        "inertia_a_row": found.inertia / job["n"], "forced": len(found.forced),
        "bf16_search": device.type != "cpu" or half_is_faster(),
        "environment": processes.environment(),
    }  # fmt: skip


def run(job: dict, laps: Laps) -> tuple[TwoLevel, dict]:
    """Raw rows -> moments -> whitening -> rows.npy -> two levels -> assignments."""
    n, stream, folder = job["n"], laps.stream, laps.folder
    with laps.stage("moments"):
        moments = moments_of(stream, n, laps.device)
    with laps.stage("eigenvectors"):
        whitening = solve(moments, job["d"])
        whitening.save(folder / "whitening.safetensors")
    del moments
    with laps.stage("projection"):
        project(stream, n, whitening, folder / "rows.npy", laps.device)
    shape = (n, job["d"])
    offset = np.load(folder / "rows.npy", mmap_mode="r").offset
    rows = Counted(folder / "rows.npy", np.float16, "r", offset, shape)
    with laps.stage("both levels"):
        points = ArrayPoints(rows, device=laps.device)
        if isinstance(points.rows, np.ndarray):
            points.rows = rows  # again: as a plain array it counts nothing
        options = KMeansOptions(job["k"], job["iterations"], job["seed"])
        found = two_level(points, job["m"], options)
    split_levels(laps, found)
    with laps.stage("assignments"):
        described = statistics.describe(found.assignments, job["k"])
        for name in ("assignments", "distances", "centroids"):
            np.save(folder / f"{name}.npy", getattr(found, name)[None])
        write_json(folder / "statistics.json", described)
    return found, {"rank": whitening.rank, "statistics": described}


def moments_of(stream: Stream, n: int, device: torch.device) -> Moments:
    """Each unit's moments, merged in unit order, about the first batch's mean, on the device."""
    pivot = stream.rows(range(BATCH)).mean(0).to(device)
    total = Moments.zero(pivot)
    for unit in chunk_ranges(np.array([0, n])):
        own = Moments.zero(pivot)
        for block in blocks(unit):
            for batch in stream.rows(block).split(BATCH):
                own.add(batch)
        total.merge(own)
    return total


def project(stream: Stream, n: int, whitening: Whitening, file: Path, device: torch.device) -> None:
    """The same rows again, whitened, to float16."""
    out = np.lib.format.open_memmap(file, "w+", np.float16, (n, whitening.matrix.shape[1]))
    for unit in chunk_ranges(np.array([0, n])):
        for block in blocks(unit):
            rows = whitening(stream.rows(block).to(device))
            out[block.start : block.stop] = rows.half().cpu().numpy()
    out.flush()


def blocks(unit: range) -> Iterator[range]:
    """Cut a unit for the generator."""
    for start in range(unit.start, unit.stop, BLOCK):
        yield range(start, min(unit.stop, start + BLOCK))


def split_levels(laps: Laps, found: TwoLevel) -> None:
    """Two stages out of the one call, by the times that it returns; the peak is of both.

    Rows that memory or a GPU holds are not read again: then CPU seconds are shared out by time.
    """
    both = laps.stages.pop()
    middle = (READS[0][0] if READS else 0.0) + found.seconds[0]
    parts = (
        [read for read in READS if read[0] < middle],
        [read for read in READS if read[0] >= middle],
    )
    if READS and parts[1]:
        first = parts[1][0][2] - READS[0][2]
    else:
        first = both["cpu_s"] * found.seconds[0] / sum(found.seconds)
    cpus = first, both["cpu_s"] - first
    for name, seconds, cpu, reads in zip(LEVELS, found.seconds, cpus, parts, strict=True):
        size = sum(size for _, size, _ in reads)
        laps.stages.append(both | {"stage": name, "seconds": seconds, "cpu_s": cpu, "read": size})


def product_rates(job: dict) -> dict[str, float]:
    """FLOP/s of a product of 2048^3, the best of six, in the types that the stages use.

    In a process of its own, since what it frees would count as memory of the stages.
    """
    rates = {}
    for name in ("float32", "bfloat16", "float64"):
        a = torch.ones(2048, 2048, dtype=getattr(torch, name), device=job["device"])
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(a, a)
            wait_for(a.device)
            seconds.append(time.perf_counter() - began)
        rates[name] = 2 * 2048**3 / min(seconds)
    return rates
