"""Speeds of this machine, from a short run of the same recipe over a part of the images.

The run is a real one: the same readers, ranks, network and clustering, for two epochs of some
batches, in a folder that is deleted. Its second round and its last steps count, since the first
ones pay for what starts.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
from webdataset.writer import TarWriter

from cluster_jobs.estimate.rows import seconds_of_a_row
from cluster_jobs.estimate.spans import Spans, later, spans_of
from cluster_jobs.estimate.speeds import Speeds
from cluster_jobs.estimate.watch import Watch
from deepclust.data.read.image_files import open_images
from deepclust.data.shards.index import Index
from deepclust.errors import ResourceError
from deepclust.recipe import Recipe
from deepclust.run.directory import Run
from deepclust.run.round_files import find_whitening
from deepclust.stages.kept_crops import room

BATCHES, FEWEST = 8, 1000  # of the part: batches, and images for each rank
PER_CLUSTER = 10  # images, so that a part has clusters
LIMIT_S = 600.0


def calibrate(recipe: Recipe, index: Index) -> Speeds:
    """Return the speeds of this machine.

    Raises `ResourceError` where the short run fails, with the end of what it said.
    """
    count = min(len(index), max(BATCHES * recipe.train.batch, FEWEST * recipe.train.ranks))
    with tempfile.TemporaryDirectory(prefix="deepclust-estimate-") as folder:
        shards, run_dir = Path(folder, "shards"), Path(folder, "run")
        _write_part(index, count, shards, recipe.seed)
        short = _short(recipe, shards, count, index.labels is not None)
        short.save(Path(folder, "recipe.yaml"))
        began = time.time()
        memory = _run(Path(folder, "recipe.yaml"), run_dir)
        run = Run(run_dir)
        spans = spans_of(run, began, time.time())
        width, dim = _widths(run)
        row = seconds_of_a_row(recipe.replace(f"train.threads={run.recipe.train.threads}"),
                               len(index), width, dim)  # fmt: skip
        memory += recipe.cost(width).per_sample * (len(index) - count)
        speeds = replace(speeds_of_run(run, count, spans, row), memory=memory)
        return _with_crops(speeds, recipe, len(index), count)


def _with_crops(speeds: Speeds, recipe: Recipe, n: int, count: int) -> Speeds:
    """Return the speeds for n images, of which a part of `count` has kept its crops."""
    one, ranks = 3 * recipe.data.size**2, recipe.train.ranks
    if recipe.cluster is None or recipe.data.crops_on_device:
        return speeds
    if n * one > ranks * room(ranks):
        return replace(speeds, again=None)
    return replace(speeds, memory=(speeds.memory or 0.0) + (n - count) * one)


def speeds_of_run(run: Run, count: int, spans: Spans, row: float) -> Speeds:
    """Return the speeds that a finished run had over `count` images, where a row takes `row` s."""
    batch = run.recipe.train.batch
    trained = _trained(run, batch)
    plans = spans.plans[1:] or spans.plans
    segment = mean([took - steps * batch / trained for steps, took in plans])
    again, extraction = _extracted(run, count, spans.extractions)
    extracted = (_rate(run, count, run.rounds()[0]) if spans.extractions else None) or again
    events = run.events()
    solves = [float(e["cluster"]) for e in events if e["event"] == "published"]
    saves = [e for e in events if e["event"] == "checkpoint"]
    return Speeds(
        start=spans.seconds["start"],
        trained=trained,
        extracted=extracted,
        again=again,
        row=row,
        segment=max(0.0, segment),
        extraction=extraction,
        round=max(0.0, later(spans.rounds) - later(solves)),
        checkpoint=spans.seconds.get("checkpoints", 0.0) / max(1, len(saves)),
        evaluated=_evaluated(run),
        shown=count,
        assumptions=[
            f"measured here: two epochs over {count:,} images, {trained:,.0f} images/s in training"
            + (f", {extracted:,.0f} in extraction" if extraction else ""),
            "k-means is timed at the recipe's k; start-up and a round's files are as measured",
            "plans and statistics of more images: as fitted up to 100 million (`guide benchmarks`)",
        ],
    )


def _trained(run: Run, batch: int) -> float:
    """Return images a second of the later half of the steps."""
    steps = run.metrics("train")
    pairs = list(itertools.pairwise(steps[max(0, len(steps) // 2 - 1) :]))
    images = [(after["step"] - before["step"]) * batch for before, after in pairs]
    seconds = sum(n / after["images_per_s"] for n, (_, after) in zip(images, pairs, strict=True))
    return sum(images) / seconds if seconds else float(steps[-1]["images_per_s"])


def _extracted(run: Run, count: int, extractions: list[float]) -> tuple[float, float]:
    """Return images a second of the last extraction, and the seconds that it takes beside them."""
    if not extractions:
        return np.inf, 0.0
    took = later(extractions)
    rate = _rate(run, count, run.rounds()[-1]) or count / took
    beside = took - count / rate
    return (rate, beside) if beside > 0 else (count / took, 0.0)


def _rate(run: Run, count: int, number: int) -> float | None:
    """Return images a second of a round's extraction, or None where it has too few chunks.

    A rank reports a chunk when its next one is extracted. So when the first is reported each rank
    has two, and until the last one they extract the others.
    """
    at = [e["time"] for e in run.events() if e["event"] == "unit" and e["round"] == number]
    had = 2 * run.recipe.train.ranks
    if len(at) <= had + 1:
        return None
    return count * (len(at) - had) / len(at) / max(float(at[-1] - at[0]), 1e-3)


def _evaluated(run: Run) -> float | None:
    """Return images a second of the last evaluation, or None without one."""
    scores = run.metrics("evaluate")
    return (scores[-1]["bank"] + scores[-1]["queries"]) / scores[-1]["seconds"] if scores else None


def _widths(run: Run) -> tuple[int, int]:
    """Return the numbers of a row as extracted, and as clustered, in the last round."""
    rounds = run.rounds()
    if not rounds:
        return 1, 1
    centroids = run.round(rounds[-1]) / "centroids" / "centroids.npy"
    dim = int(np.load(centroids, mmap_mode="r").shape[-1]) if centroids.exists() else 1
    whitening = find_whitening(run.round(rounds[-1]))
    return (dim if whitening is None else len(whitening.mean)), dim


def _short(recipe: Recipe, shards: Path, count: int, labelled: bool = False) -> Recipe:
    """Return the recipe of the short run: the same work for an image, two epochs."""
    evaluate = "1 epoch" if labelled and recipe.train.evaluate is not None else "null"
    changes = [
        f"data.shards={shards}", "data.index=null", "data.stage=null", "train.epochs=2",
        "train.warmup=0", "train.average_from=null", "train.log=2", "init.weights=null",
        "init.assignments=null", "train.steps_at=[]", "train.evaluate_data=null",
        f"train.evaluate={evaluate}", "notify=null", "track=[]",
    ]  # fmt: skip
    if recipe.cluster is not None:
        k = min(recipe.clustering.k, max(2, count // PER_CLUSTER))
        if recipe.clustering.supers > 1:
            k = max(recipe.clustering.supers, k - k % recipe.clustering.supers)
        changes += [f"cluster.k={k}", "cluster.every=1 epoch", "cluster.until=null"]
    return recipe.replace(*changes)


def _write_part(index: Index, count: int, folder: Path, seed: int) -> None:
    """Write some images of an index, evenly taken, as one shard with their keys and labels."""
    folder.mkdir()
    ids = np.linspace(0, len(index) - 1, count).astype(np.int64)
    files = open_images(index)
    try:
        with TarWriter(str(folder / "part-000000.tar")) as tar:
            for sample_id in np.unique(ids).tolist():
                where = index.locate(np.array([sample_id]))
                body = files.read(*(int(column[0]) for column in where))
                label = -1 if index.labels is None else int(index.labels[sample_id])
                labelled = {} if label < 0 else {"cls": str(label).encode()}
                tar.write({"__key__": f"{sample_id:09d}", "jpg": body, **labelled})
    finally:
        files.close()


def _run(recipe: Path, run_dir: Path) -> float:
    """Run the recipe, and return the memory that its processes had at their peak, in bytes."""
    command = [sys.executable, "-P", "-m", "cluster_jobs.cli", "pretrain", str(recipe)]
    process = subprocess.Popen(
        [*command, "--run", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, process_group=0,
    )  # fmt: skip
    try:
        with Watch(process.pid, run_dir) as watch:
            _, said = process.communicate(timeout=LIMIT_S)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)  # the run ends its ranks and readers
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ResourceError(
                f"the short run did not end in {LIMIT_S:.0f} s: give --device, or a smaller "
                "train.batch"
            ) from None
        raise
    if process.returncode:
        end = "\n".join(said.strip().splitlines()[-3:])
        raise ResourceError(f"the short run that measures this machine failed: {end}")
    return watch.memory
