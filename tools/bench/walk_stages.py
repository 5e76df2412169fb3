"""The stages of the walk: the product's functions on the files of one run, one stage a process.

The run has n samples in shards of 5,000. A shard is a sparse tar with one PNG, and by the index the
image of every sample lies there: so the report has pictures to show, and images need no disk. Rows
come where the network would be asked (`Generated`), batch by batch, from the sample ids.
"""

from __future__ import annotations

import io
import os
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from memory import Peak, anonymous
from PIL import Image
from torch import Tensor

from cluster_jobs.report import write_report
from cluster_jobs.results.assignments import export_assignments
from deepclust.clustering import statistics
from deepclust.data.plan import EpochPlan
from deepclust.data.read.dataset import Loaded
from deepclust.data.shards import index_build
from deepclust.data.shards.fields import DEFAULT
from deepclust.data.shards.index import open_index
from deepclust.data.shards.left_out import Tally
from deepclust.data.shards.scan import Scan, scan
from deepclust.methods.parts.bank import Bank
from deepclust.methods.parts.sharded_head import SubHead
from deepclust.recipe import Recipe
from deepclust.recipe.sections import SeedsSection
from deepclust.run import checkpoint_writer, directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from deepclust.run.reporting import DirectReport
from deepclust.run.round_files import find_whitening
from deepclust.run.state import State
from deepclust.seeds.table import load
from deepclust.stages import cluster
from deepclust.stages.extract import ExtractContext, extract
from deepclust.stages.project import project
from deepclust.stages.publish import publish
from deepclust.stages.round_kmeans import RoundClusters
from deepclust.trained.labelling import label, rule_of
from deepclust.world import ALONE, World

SHARD = 5_000  # samples
DIM, GAUSSIANS = 64, 1_000
FLAT_K = 10_000
PAIRS, SUPERS = 312, 16  # samples a cluster in two levels: 320,000 clusters of 100M
RANKS = 64  # that share the bank and the head of the checkpoint
HEADER_SHARDS = 20  # shards with all their members, for the scan of headers
Found = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A function of (folder, n), and a sentence on what it was given."""

    run: Callable[[Path, int], Found]
    note: str = ""

    def measured(self, folder: Path, n: int) -> Found:
        """Return seconds, core seconds, peak and bytes of the stage in this process."""
        base, moved = anonymous(os.getpid()), _moved()
        with Peak() as peak:
            took = clock()
            found = self.run(folder, n)
            found = {**took(), **found}  # a stage that makes its input first has its own clock
        read, written = (after - before for after, before in zip(_moved(), moved, strict=True))
        return {
            "peak": peak.before + peak.bytes - base,
            "read": read + found.pop("mapped", 0), "written": written + found.pop("stored", 0),
            "note": self.note, **found,
        }  # fmt: skip


def _moved() -> tuple[int, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    facts = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return facts["rchar"], facts["wchar"]


def clock() -> Callable[[], Found]:
    """Start counting, and return what tells the seconds and core seconds since."""
    began, used = time.perf_counter(), _core()
    return lambda: {"seconds": time.perf_counter() - began, "core": _core() - used}


def _core() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def headers(folder: Path, n: int) -> Found:
    """Scan the headers of whole shards, two members a sample."""
    place = folder / "headers"
    place.mkdir(exist_ok=True)
    shards = min(HEADER_SHARDS, n // SHARD)
    for shard in range(shards):
        if not (place / f"{shard}.tar").exists():
            _write_whole_shard(place / f"{shard}.tar")
    took = clock()
    assert sum(len(scan(place / f"{shard}.tar").keys) for shard in range(shards)) == shards * SHARD
    return {**took(), "samples": shards * SHARD}


def _write_whole_shard(path: Path) -> None:
    png = _png()
    with tarfile.open(path, "w") as tar:
        for sample in range(SHARD):
            _add(tar, f"{sample:05d}.png", png)
            _add(tar, f"{sample:05d}.cls", str(sample % GAUSSIANS).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 60)).save(data, "png")
    return data.getvalue()


def write_index(folder: Path, n: int) -> Found:
    """Write the index of n samples from scans that are made on the way."""
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    png = _png()
    for shard in range(n // SHARD):
        with tarfile.open(shards / f"{shard:05d}.tar", "w") as tar:
            _add(tar, "0.png", png)
        os.truncate(shards / f"{shard:05d}.tar", 2048 * SHARD)
    sizes = (len(png), (shards / "00000.tar").stat().st_size)
    paths = sorted(shards.glob("*.tar"))
    place = shards / "deepclust-index"

    def fill(partial: Path) -> None:
        scans = (_scan(shard, path.name, *sizes) for shard, path in enumerate(paths))
        manifest = index_build.fill(partial, scans, DEFAULT, Tally())
        manifest["fields"] = DEFAULT._asdict()
        index_build.save(partial, manifest)

    took = clock()
    index_build.put(place, fill, replace=True)
    return {**took(), "on_disk": _size(place)}


def _scan(shard: int, name: str, image: int, size: int) -> Scan:
    ids = np.arange(shard * SHARD, (shard + 1) * SHARD)
    keys = pa.array(np.char.mod("%09d", ids))
    return Scan(
        name=name, size=size, digest=f"{shard:032x}", keys=keys,
        offsets=np.full(SHARD, 512, np.uint64), sizes=np.full(SHARD, image, np.uint32),
        labels=_gaussian(ids).astype(np.int32), excluded={},
    )  # fmt: skip


def _gaussian(ids: np.ndarray) -> np.ndarray:
    """The Gaussian that each sample is drawn from."""
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(33)) % np.uint64(GAUSSIANS)).astype(np.int64)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def open_it(folder: Path, n: int) -> Found:
    """Open the index, as every rank does."""
    index = open_index(str(folder / "shards"))
    assert len(index) == n
    return {"fingerprint": index.fingerprint}


def _recipe(folder: Path, n: int, levels: int) -> Recipe:
    method = "demo-fashion" if levels == 1 else "deepercluster-fashion"
    k = FLAT_K if levels == 1 else n // PAIRS // SUPERS * SUPERS
    supers = [f"cluster.supers={SUPERS}"] if levels == 2 else []
    words = [
        f"data.shards={folder / 'shards'}", "data.extract_batch=4096", f"cluster.dim={DIM}",
        f"cluster.k={k}", "cluster.iterations=2", *supers,
    ]  # fmt: skip
    return Recipe.load(method, *words)


def _run(folder: Path, n: int, levels: int = 1) -> Path:
    path = folder / ("run" if levels == 1 else "run-two-levels")
    if not (path / "recipe.yaml").exists():
        directory.create(path, _recipe(folder, n, levels))
    return path


class Generated:
    """A loader whose images are the sample ids, and the network that turns them into rows."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.centres = torch.randn(GAUSSIANS, DIM, generator=draw) * torch.linspace(3, 0.3, DIM)

    def stream(self, requests: Iterator[Any]) -> Iterator[Loaded]:
        """Yield each request's sample ids as its images."""
        for asked in requests:
            ids = torch.from_numpy(asked.sample_ids)
            yield Loaded((ids,), asked.sample_ids, asked.positions, [], asked.tag)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the rows of these samples, drawn from the first id."""
        noise = torch.Generator().manual_seed(int(ids[0]))
        rows = torch.randn(len(ids), DIM, generator=noise)
        return rows + self.centres[torch.from_numpy(_gaussian(ids.numpy()))]


def _in_run(folder: Path, n: int, work: Callable[[ExtractContext], Found]) -> Found:
    """Hold the run while something is done to round 0."""
    path = _run(folder, n)
    with hold(path) as token:
        run = Run(path, token)
        report = DirectReport(run, lambda record: None)
        index = open_index(str(folder / "shards"))
        source: Any = Generated()
        took = clock()
        found = work(
            ExtractContext(run, 0, ALONE, index, source, run.recipe.data, report, lambda: False)
        )
        return {**took(), **found}


def extraction(folder: Path, n: int) -> Found:
    """Extract all chunks: rows, moments, hashes, commits; the making of rows is measured too."""

    def work(context: ExtractContext) -> Found:
        source = context.loader
        made = [0.0]

        def embed(ids: Tensor) -> Tensor:
            began = time.perf_counter()
            rows = source.embed(ids)  # type: ignore[attr-defined]
            made[0] += time.perf_counter() - began
            return rows

        extract(context, embed)
        return {"making rows": made[0]}

    return _in_run(folder, n, work)


def whitening(folder: Path, n: int) -> Found:
    """Merge the moments of all chunks, and solve."""

    def work(context: ExtractContext) -> Found:
        cluster.solve_whitening(_clustering(context, 1), 0)
        return {"mapped": _size(context.raw_dir)}

    return _in_run(folder, n, work)


def projection(folder: Path, n: int) -> Found:
    """Whiten all rows into features/rows.npy."""

    def work(context: ExtractContext) -> Found:
        project(context, find_whitening(context.run.round(0)))
        return {"mapped": _size(context.raw_dir)}

    return _in_run(folder, n, work)


def _clustering(context: ExtractContext, levels: int) -> cluster.ClusterContext:
    recipe = context.run.recipe
    assert recipe.clustering is not None
    return cluster.make_context(
        context.run, recipe, context.index, torch.device("cpu"), context.report, ALONE
    )


def flat(folder: Path, n: int) -> Found:
    """Cluster and publish: k = 10,000, two iterations, matched to the labels."""

    def work(context: ExtractContext) -> Found:
        cluster.cluster_features(_clustering(context, 1), 0)
        return {"mapped": _size(context.run.round(0) / "features")}

    return _in_run(folder, n, work)


def two_levels(folder: Path, n: int) -> Found:
    """The same in two levels, n / 312 clusters, on the same rows."""
    return _on_same_rows(
        folder, n, "run-two-levels", 2, lambda one: cluster.cluster_features(one, 0)
    )


def published(folder: Path, n: int) -> Found:
    """Publish a round whose clusters are the Gaussians, split: statistics, files and hashes."""

    def work(context: cluster.ClusterContext) -> None:
        rows = np.load(context.run.round(0) / "features/rows.npy", mmap_mode="r")
        ids = _split_gaussians(n)
        firsts = np.unique(ids[: 100 * FLAT_K], return_index=True)[1]
        none, distances = np.zeros(0, np.int64), np.ones(n, np.float32)
        one = RoundClusters(
            ids, distances, rows[firsts].astype(np.float32), float(n), none, none, {}
        )
        publish(context, 0, rows, [one], None, time.monotonic())

    return _on_same_rows(folder, n, "run-published", 1, work)


def _on_same_rows(
    folder: Path, n: int, name: str, levels: int, work: Callable[[cluster.ClusterContext], None]
) -> Found:
    """Cluster or publish the rows of the run in a run of another name."""
    path = folder / name
    if not (path / "recipe.yaml").exists():
        directory.create(path, _recipe(folder, n, levels))
    features = _run(folder, n) / "rounds/0000/features"
    copy = path / "rounds/0000/features"
    if not copy.exists():
        copy.mkdir(parents=True)
        for file in features.iterdir():
            os.link(file, copy / file.name)
    with hold(path) as token:
        run = Run(path, token)
        index = open_index(str(folder / "shards"))
        report = DirectReport(run, lambda record: None)
        context = cluster.make_context(run, run.recipe, index, torch.device("cpu"), report, ALONE)
        took = clock()
        work(context)
        return {**took(), "mapped": _size(copy)}


def _split_gaussians(n: int) -> np.ndarray:
    ids = np.arange(n)
    return (_gaussian(ids) * 10 + ids % 10).astype(np.int32)


def _clustered(folder: Path, n: int) -> Path:
    """Return the run with a round: that of `flat`, or where it was left out that of `publish`."""
    run = _run(folder, n)
    done = (run / "rounds/0000/assignments/DONE").exists()
    return run if done else folder / "run-published"


def _assigned(folder: Path, n: int) -> np.ndarray:
    """Return the assignments of the round."""
    rounds = _clustered(folder, n) / "rounds"
    return np.load(rounds / "0000/assignments/assignments.npy", mmap_mode="r")[0]


def described(folder: Path, n: int) -> Found:
    """Statistics of a round after another: matched ids, sizes, entropy, NMI, ARI, accuracy."""
    assignments, k = _assigned(folder, n), FLAT_K
    index = open_index(str(folder / "shards"))
    before = np.random.default_rng(0).permutation(k).astype(np.int32)[np.asarray(assignments)]
    before[::10] = (before[::10] + 1) % k
    took = clock()
    matching = statistics.match(before, np.asarray(assignments), k)
    now = matching.new_ids[assignments].astype(np.int32)
    told = statistics.describe(now, k, previous=before, classes=index.labels)
    return {**took(), "moved": told["reassigned"]}


def plan(folder: Path, n: int) -> Found:
    """Plan one epoch of n draws, uniform over clusters, in 8 lanes."""
    assignments = _assigned(folder, n)
    bases = np.arange(0, n + 1, SHARD)
    took = clock()
    made = EpochPlan.build(assignments, 0, 0, 4096, lanes=8, blocks=bases)
    return {**took(), "steps": made.steps}


def seeds(folder: Path, n: int) -> Found:
    """Join a table of labels by key: one sample of a hundred, 1M of 100M."""
    ids = np.random.default_rng(0).choice(n, n // 100, replace=False)
    columns = {
        "key": pa.array(np.char.mod("%09d", ids)),
        "class": pa.array(np.char.mod("%d", _gaussian(ids) % 100)),
    }
    file = folder / "seeds.parquet"
    pq.write_table(pa.table(columns), file)
    index = open_index(str(folder / "shards"))
    took = clock()
    found = load(index, SeedsSection(labels=str(file)), seed=0)
    return {**took(), "labels": len(found.table)}


def report_(folder: Path, n: int) -> Found:
    """The report, with every cluster in its browser."""
    write_report(_clustered(folder, n), folder / "report.html")
    return {"on_disk": (folder / "report.html").stat().st_size}


def export(folder: Path, n: int) -> Found:
    """All assignments as one Parquet table."""
    export_assignments(_clustered(folder, n), folder / "assignments.parquet")
    return {"on_disk": (folder / "assignments.parquet").stat().st_size}


def predicting(folder: Path, n: int) -> Found:
    """The clusters of rows that are there: one row of a hundred."""
    run = Run(_clustered(folder, n))
    rows = np.load(run.round(0) / "features/rows.npy", mmap_mode="r")[: n // 100]
    took = clock()
    labels = label(rule_of(run, 0), rows)
    return {**took(), "rows": len(labels.clusters)}


def saved(folder: Path, n: int) -> Found:
    """A checkpoint of one of 64 ranks: its rows of a bank, its part of a head."""
    first = World()
    bank = Bank(n // RANKS, 2, 128, first)
    bank.rows.fill_(1)
    subs = n // PAIRS // SUPERS // RANKS
    head = SubHead(4096, 4 * SUPERS, max(1, subs), first, seed=0)
    path = _run(folder, n)
    owned = {
        "bank": (bank.rows, bank.range), "weight": (head.weight.detach(), head.range),
        "bias": (head.bias.detach(), head.range),
    }  # fmt: skip
    with hold(path) as token:
        run = Run(path, token)
        took = clock()
        checkpoint_writer.save(run, State(step=1), {"model": {}}, 1, owned)
        found = took()
        directory.prune(run.checkpoints(), 0)
    return found


FUNCTIONS: dict[str, Stage] = {
    "headers": Stage(headers, "at most 100,000 samples are scanned; linear by construction"),
    "index": Stage(write_index, "from generated scans"),
    "open": Stage(open_it),
    "extraction": Stage(extraction, "rows are generated"),
    "whitening": Stage(whitening),
    "projection": Stage(projection),
    "flat": Stage(flat, "k = 10,000, 2 iterations, published"),
    "two levels": Stage(two_levels, f"k = n / {PAIRS} in {SUPERS} super-clusters, 2 iterations"),
    "publish": Stage(published, "the Gaussians, split into 10,000 clusters"),
    "statistics": Stage(described),
    "plan": Stage(plan),
    "seeds": Stage(seeds, "n / 100 labels by key"),
    "report": Stage(report_),
    "assignments": Stage(export),
    "predict": Stage(predicting, "n / 100 rows"),
    "checkpoint": Stage(saved, "one rank of 64"),
}
