"""Extraction: every image through the backbone, once a round, in fixed chunks.

A chunk is a range of sample ids that does not depend on the number of ranks. Ranks draw chunks from
one queue. A chunk commits its rows and its moments together in one file, and one that is there is
not done again. So a killed extraction continues, and the result does not depend on which rank did
what. Rows are kept as fp16 of (feature - pivot) until `project.py` whitens them.

On disk a chunk is `raw/unit-00000.safetensors`, and its event is "unit", as in older runs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deepclust.clustering.moments import Moments, unpacked
from deepclust.copies import to_host
from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.images.device_crops import on_device
from deepclust.data.read.dataset import Loaded
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, NumericalError, RequeueWanted
from deepclust.files import create_empty, write_json
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run, is_done
from deepclust.run.reporting import Report
from deepclust.run.signs import unwatched
from deepclust.stages import raw_chunk
from deepclust.stages.ahead import Ahead
from deepclust.stages.chunk_writer import ChunkWriter
from deepclust.stages.kept_crops import KeptCrops
from deepclust.stages.progress import StageProgress
from deepclust.stages.raw_memory import RawMemory
from deepclust.stages.unusable import check_bad, count_bad, not_finite
from deepclust.world import World

CHUNKS = 64
SMALLEST_CHUNK = 256
LARGEST_CHUNK = 2**18  # 2 GB of float16 at D = 4096, which a rank has in memory at a time
CHUNK_FILES = "unit-*.safetensors"
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExtractContext:
    """What an extraction needs: where it writes, what it reads, and who takes part."""

    run: Run
    round: int
    world: World
    index: Index
    loader: Loader
    config: Data
    report: Report
    stopping: Callable[[], bool]
    dtype: torch.dtype = torch.float16  # of the rows on disk
    moments: bool = True  # whether a whitening is to be solved from them
    memory: RawMemory | None = None  # where rows may stay until they are projected; None: on disk
    kept: KeptCrops = field(default_factory=KeptCrops)  # crops for the next round

    @property
    def raw_dir(self) -> Path:
        """Scratch for chunk files, deleted when the features are done."""
        return self.run.round(self.round) / "raw"

    @property
    def rows_path(self) -> Path:
        """The file for projected rows.

        Its name keeps processes of an older attempt out.
        """
        return self.raw_dir / f"rows-{self.run.token}.npy"

    def chunk_path(self, number: int) -> Path:
        """Return the file of a chunk's rows and moments."""
        return self.raw_dir / f"unit-{number:05d}.safetensors"

    def draw(self, queue: str, numbers: list[int]) -> Iterator[int]:
        """Yield chunks from the queue of all ranks, until it is empty or a stop is wanted."""
        while not self.stopping():
            ticket = self.world.ticket(f"{queue}-{self.round}")
            if ticket >= len(numbers):
                return
            yield numbers[ticket]

    def finish_together(self) -> None:
        """Wait for the other ranks; raise `RequeueWanted` on all when one is to stop.

        A rank may be done a chunk before another, which takes longer than a collective may wait.
        """
        self.world.barrier()
        if self.world.max_int(int(self.stopping())):
            raise RequeueWanted("stopped during extraction; finished chunks on disk are kept")

    def progress(self, stage: str) -> StageProgress:
        """Return the progress of a stage of this round."""
        return StageProgress(self.report, self.world, stage, self.round)


@dataclass
class _Open:
    """A chunk that is being filled."""

    rows: list[Float[Tensor, "b D"]] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    moments: Moments | None = None
    stays: bool = False  # its rows in memory


def chunk_ranges(bases: Int64[np.ndarray, " s1"]) -> list[range]:
    """Cut all sample ids into 64 chunks, at shard boundaries where there are enough.

    Fewer than 64 if they would be tiny, more if they would not fit into memory.
    """
    n = int(bases[-1])
    count = max(1, min(CHUNKS, n // SMALLEST_CHUNK), -(-n // LARGEST_CHUNK))
    cuts = np.linspace(0, n, count + 1).round().astype(np.int64)
    if len(bases) - 1 >= count:
        cuts = np.unique(bases[np.searchsorted(bases, cuts)])
    return [range(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def extract(context: ExtractContext, embed: Embed) -> None:
    """Fill `raw/` with every chunk's rows and moments, then mark it DONE."""
    chunks = chunk_ranges(context.index.bases)
    if context.world.is_first and not is_done(context.raw_dir.parent / "features"):
        _drop_lost(context)
        _drop_damaged(context, len(chunks))
    context.world.barrier()
    # rank 0 decides for all
    if context.world.broadcast_object(
        is_done(context.raw_dir) or is_done(context.raw_dir.parent / "features")
    ):
        return
    check_bad(context, len(context.index.excluded), {})
    if context.world.is_first:
        context.raw_dir.mkdir(parents=True, exist_ok=True)
        _write_pivot(context, embed, chunks[0])
    context.world.barrier()
    pivot = torch.from_numpy(raw_chunk.read_pivot(context.raw_dir)).to(context.world.device)
    missing = [number for number in range(len(chunks)) if not context.chunk_path(number).exists()]
    if context.world.is_first:  # of an earlier attempt
        count_bad(context, read_chunk_exclusions(context.raw_dir, context.run.alive))
    context.world.barrier()
    _fill(context, embed, chunks, context.world.broadcast_object(missing), pivot)
    context.finish_together()
    if context.world.is_first:
        _finish_raw(context, len(chunks))
    context.world.barrier()


def extract_share(context: ExtractContext, embed: Embed, share: int, of: int) -> None:
    """Fill the chunks of one of several processes that share a `raw/`, whose pivot is there.

    They need no process group: chunk i is that of share i mod `of`. `extract` makes what is missing
    afterwards, and marks the whole.
    """
    chunks = chunk_ranges(context.index.bases)
    pivot = torch.from_numpy(raw_chunk.read_pivot(context.raw_dir)).to(context.world.device)
    own = [n for n in range(share, len(chunks), of) if not context.chunk_path(n).exists()]
    _fill(context, embed, chunks, own, pivot)


def merge_moments(raw_dir: Path, progress: StageProgress) -> Moments:
    """Return all chunks' moments, added in chunk order, so that the sum has one value only."""
    total: Moments | None = None
    files = sorted(raw_dir.glob(CHUNK_FILES))
    for done, file in enumerate(files, start=1):
        with raw_chunk.opened(file, progress.report.alive) as tensors:
            chunk = _moments_of(tensors)
        total = chunk if total is None else total.merge(chunk)
        progress.show(done, len(files))
    assert total is not None
    return total


def _moments_of(tensors: Any) -> Moments:
    """Return the moments of an open chunk; older versions wrote the whole outer product."""
    pivot = tensors.get_tensor("pivot")
    if "outer" in tensors.keys():  # noqa: SIM118 - not a mapping
        outer = tensors.get_tensor("outer")
    else:
        outer = unpacked(tensors.get_tensor("outer_panels"), len(pivot))
    return Moments(int(tensors.get_tensor("count")), pivot, tensors.get_tensor("sum"), outer)


def read_chunk_exclusions(raw_dir: Path, alive: Callable[[], None] = unwatched) -> dict[int, str]:
    """Return the samples without a usable row, and why, of all chunks."""
    excluded: dict[int, str] = {}
    for file in sorted(raw_dir.glob(CHUNK_FILES)):
        with raw_chunk.opened(file, alive) as tensors:
            reasons = json.loads(tensors.metadata()["excluded"])
        excluded.update({int(sample): reason for sample, reason in reasons.items()})
    return excluded


def _drop_lost(context: ExtractContext) -> None:
    """Delete the chunks whose rows were in the memory of a process that has ended."""
    files = sorted(context.raw_dir.glob(CHUNK_FILES))
    lost = [file for file in files if not raw_chunk.has_rows(file)]
    if not lost:
        return
    context.run.fence()
    for file in [context.raw_dir / "DONE", *lost]:
        file.unlink(missing_ok=True)
    text = (
        f"the rows of {len(lost)} chunks of round {context.round} were in the memory of an attempt "
        "that has ended, so they are extracted again (cluster.raw=disk keeps them)"
    )
    context.report.event("warning", text=text)


def _drop_damaged(context: ExtractContext, chunks: int) -> None:
    """Delete the chunks that are not as they were written, so that they are extracted again."""
    damaged = raw_chunk.find_damaged(context.raw_dir, context.run.alive)
    files = [context.chunk_path(number) for number in range(chunks)]
    is_short = is_done(context.raw_dir) and not all(file.exists() for file in files)
    if not damaged and not is_short:
        return
    context.run.fence()
    for file in [context.raw_dir / "DONE", *damaged]:
        file.unlink(missing_ok=True)
    names = ", ".join(file.name for file in damaged[:5]) or "chunks that are missing"
    text = (
        f"{context.raw_dir} is damaged ({names}): that part of round {context.round} is made again"
    )
    context.report.event("warning", text=text)


def _write_pivot(context: ExtractContext, embed: Embed, chunk: range) -> None:
    """Write the mean of chunk 0's first batch: near the true mean, the same on every restart."""
    path = context.raw_dir / "pivot.npy"
    if path.exists():
        return
    sample_ids = np.arange(chunk.start, min(chunk.stop, chunk.start + context.config.extract_batch))
    if 0 in context.kept.chunks:
        loaded = context.kept.chunks[0][0]
    else:
        loaded = next(iter(context.loader.stream([_request(context.config, sample_ids)])))
    images = on_device(loaded.images[0], context.world.device)
    (rows,) = to_host(embed(images))
    usable = torch.isfinite(rows).all(1)
    usable[[int(b.sample_id) - chunk.start for b in loaded.bad]] = False
    first = f"none of the first {len(sample_ids)} images of {context.index.origin}"
    if len(loaded.bad) == len(sample_ids):
        raise DataError(f"{first} can be read; the first: {loaded.bad[0].reason}")
    if not usable.any():
        raise NumericalError(
            f"{first} gives finite features; look at the images, or lower train.lr if this is not "
            "the first round"
        )
    raw_chunk.write_pivot(context.raw_dir, rows[usable].mean(0).numpy(), context.run.fence)


def _request(config: Data, sample_ids: Int64[np.ndarray, " b"], chunk: int = 0) -> Request:
    crop = Crop(CentreCrop(config.size, config.short_side))
    packed = config.crops_on_device
    return Request(sample_ids, positions=sample_ids, key=0, crops=(crop,), tag=chunk, packed=packed)


def _fill(
    context: ExtractContext, embed: Embed, chunks: list[range], missing: list[int], pivot: Tensor
) -> None:
    """Extract the chunks that this rank draws, and commit each when its last batch is in."""
    step, progress = context.config.extract_batch, context.progress("extract")

    def commit(number: int, chunk: _Open) -> None:
        _commit_chunk(context, number, chunk, pivot)

    def done(number: int) -> None:
        context.report.event("unit", round=context.round, unit=number, of=len(chunks))
        progress.show(len(chunks) - len(missing) + missing.index(number) + 1, len(chunks))

    def opened(number: int) -> _Open:
        size = len(chunks[number]) * len(pivot) * context.dtype.itemsize
        return _Open(stays=context.memory is not None and context.memory.takes(size))

    def sent(loaded: Loaded) -> Tensor:
        return on_device(loaded.images[0], context.world.device)

    current: _Open | None = None
    with ChunkWriter(commit, done) as writer:
        for ready in Ahead(_load(context, chunks, missing), sent, context.world.device):
            context.report.alive()
            loaded, number = ready.loaded, ready.loaded.tag
            current = opened(number) if current is None else current
            rows = embed(ready.batch).float()
            count_bad(context, _add_batch(context, current, rows, loaded, pivot))
            if len(current.rows) == -(-len(chunks[number]) // step):
                _keep(context, number, current)
                writer.put(number, current)
                current = None


def _load(context: ExtractContext, chunks: list[range], missing: list[int]) -> Iterator[Loaded]:
    """Yield the batches of the missing chunks that this rank keeps, then of those that it draws."""
    kept, step = context.kept, context.config.extract_batch
    held = kept.held(context.world, len(chunks))
    drawn = [number for number in missing if not held[number]]
    for number in missing:
        if number in kept.chunks and not context.stopping():
            yield from kept.chunks[number]

    def requests() -> Iterator[Request]:
        for number in context.draw("extract", drawn):
            chunk = chunks[number]
            for start in range(chunk.start, chunk.stop, step):
                sample_ids = np.arange(start, min(chunk.stop, start + step))
                yield _request(context.config, sample_ids, number)

    for loaded in context.loader.stream(requests()):
        kept.offer(loaded, len(chunks[loaded.tag]))
        yield loaded


def _add_batch(
    context: ExtractContext, chunk: _Open, rows: Tensor, loaded: Loaded, pivot: Tensor
) -> dict[int, str]:
    """Centre, round to fp16, count what is usable, and return why the rest is not.

    A row that is not becomes zeros. A GPU is waited for once, as long as all rows are usable.
    """
    sample_ids = loaded.sample_ids
    half = (rows - pivot).to(context.dtype)
    usable = torch.isfinite(half).all(1)
    reasons = {int(item.sample_id): str(item.reason) for item in loaded.bad}
    broken = np.isin(sample_ids, list(reasons))
    if broken.any():
        usable &= torch.from_numpy(~broken).to(usable.device)
    half = torch.where(usable[:, None], half, 0)
    if chunk.stays:
        (whole,) = to_host(usable)
    else:
        half, whole = to_host(half, usable)
    for sample in sample_ids[~whole.numpy() & ~broken]:
        reasons[int(sample)] = not_finite(int(sample))
    if context.moments:
        chunk.moments = Moments.zero(pivot) if chunk.moments is None else chunk.moments
        chunk.moments.add(rows if whole.all() else rows[usable])
    chunk.rows.append(half)
    chunk.bad.update(reasons)
    return reasons


def _keep(context: ExtractContext, number: int, chunk: _Open) -> None:
    """Let the rows of a full chunk stay in memory, if there was room for them."""
    if chunk.stays:
        assert context.memory is not None
        context.memory.rows[number] = torch.cat(chunk.rows)
        chunk.rows.clear()


def _commit_chunk(context: ExtractContext, number: int, chunk: _Open, pivot: Tensor) -> None:
    tensors = {"pivot": pivot}
    if not chunk.stays:
        tensors["rows"] = torch.cat(chunk.rows)
    if (moments := chunk.moments) is not None:
        count = torch.tensor(moments.count)
        tensors |= {"count": count, "sum": moments.sum, "outer_panels": moments.packed()}
    raw_chunk.write(
        context.chunk_path(number),
        tensors,
        {"excluded": json.dumps(chunk.bad)},
        context.run.fence,
        context.run.alive,
    )


def _finish_raw(context: ExtractContext, chunks: int) -> None:
    excluded = read_chunk_exclusions(context.raw_dir, context.run.alive)
    check_bad(context, len(excluded), excluded)
    write_json(context.raw_dir / "manifest.json", {"units": chunks, "excluded": len(excluded)})
    context.run.fence()
    create_empty(context.raw_dir / "DONE")
    context.report.event("extracted", round=context.round, units=chunks, excluded=len(excluded))
