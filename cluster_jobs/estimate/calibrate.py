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
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from cluster_jobs.estimate.counts import centroids_of_a_row
from cluster_jobs.estimate.speeds import Speeds
from deepclust.data.read.image_files import open_images
from deepclust.data.shards.index import Index
from deepclust.errors import ResourceError
from deepclust.recipe import Recipe
from deepclust.run.directory import Run

BATCHES, FEWEST = 8, 1000  # images of the part
PER_CLUSTER = 10  # images, so that a part has clusters
LIMIT_S = 600.0
Event = dict[str, Any]


def calibrate(recipe: Recipe, index: Index) -> Speeds:
    """Return the speeds of this machine.

    Raises `ResourceError` where the short run fails, with the end of what it said.
    """
    count = min(len(index), max(BATCHES * recipe.train.batch, FEWEST))
    with tempfile.TemporaryDirectory(prefix="deepclust-estimate-") as folder:
        shards, run_dir = Path(folder, "shards"), Path(folder, "run")
        _write_part(index, count, shards, recipe.seed)
        short = _short(recipe, shards, count)
        short.save(Path(folder, "recipe.yaml"))
        _run(Path(folder, "recipe.yaml"), run_dir)
        return speeds_of_run(Run(run_dir), count)


def speeds_of_run(run: Run, count: int) -> Speeds:
    """Return the speeds that a finished run had over `count` images."""
    events, batch = run.events(), run.recipe.train.batch
    steps = run.metrics("train")
    last = steps[len(steps) // 2 :]
    at = {name: [e for e in events if e["event"] == name] for name in {e["event"] for e in events}}
    first = min(e["time"] for name in ("unit", "training") for e in at.get(name, []))
    training = sum((e["step"] - b["step"]) * batch / e["images_per_s"] for b, e in _pairs(steps))
    images = sum((e["step"] - b["step"]) * batch for b, e in _pairs(steps))
    trained = images / training if training else last[-1]["images_per_s"]
    extracted, clustered = _rounds(events, count)
    cluster = run.recipe.cluster
    solve = [e["cluster"] for e in at.get("published", [])]
    pairs = np.inf
    if cluster is not None and solve:
        compared = count * sum(centroids_of_a_row(run.recipe))
        pairs = compared * (cluster.iterations + 1) / max(solve[-1], 1e-3)
    return Speeds(
        start=first - events[0]["time"],
        trained=trained,
        extracted=extracted,
        pairs=float(pairs),
        round=max(0.0, clustered - (solve[-1] if solve else 0.0)),
        checkpoint=0.0,  # written beside the training
        assumptions=[
            f"measured here: two epochs over {count:,} images, {trained:,.0f} images/s in training"
            + (f", {extracted:,.0f} in extraction" if np.isfinite(extracted) else ""),
            "k-means grows with rows times clusters; start-up and a round's files are as measured",
        ],
    )


def _pairs(steps: list[Event]) -> list[tuple[Event, Event]]:
    """Return neighbours of the later half of the metrics."""
    half = steps[max(0, len(steps) // 2 - 1) :]
    return list(itertools.pairwise(half))


def _rounds(events: list[Event], count: int) -> tuple[float, float]:
    """Return images a second of the last extraction, and the seconds of its round after that."""
    done = [i for i, event in enumerate(events) if event["event"] == "extracted"]
    if not done:
        return np.inf, 0.0
    end = done[-1]
    before = next(
        e["time"] for e in reversed(events[:end]) if e["event"] not in ("unit", "extracted")
    )
    after = [e["time"] for e in events[end:] if e["event"] in ("waited", "published", "clustered")]
    took = max(events[end]["time"] - before, 1e-3)
    return count / took, max(after, default=events[end]["time"]) - events[end]["time"]


def _short(recipe: Recipe, shards: Path, count: int) -> Recipe:
    """Return the recipe of the short run: the same work for an image, two epochs."""
    changes = [
        f"data.shards={shards}", "data.index=null", "data.stage=null", "train.epochs=2",
        "train.warmup=0", "train.average_from=null", "train.log=2", "init.weights=null",
        "init.assignments=null", "train.steps_at=[]",
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


def _run(recipe: Path, run_dir: Path) -> None:
    command = [sys.executable, "-m", "cluster_jobs.cli", "pretrain", str(recipe)]
    process = subprocess.Popen(
        [*command, "--run", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
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
