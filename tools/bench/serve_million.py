#!/usr/bin/env python3
"""What `deepclust serve` takes for one run of a million images: seconds and memory, by page.

    python -m tools.bench.serve_million OUT [--samples 1000000] [--k 1000]

The run is made by hand in OUT, with the library's own writers: shards of 28-pixel images, of which
1,000 differ, features of 64 numbers about k centres, three rounds. The server is another process.
"First" is the first request of a kind, which reads what later ones share. Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from webdataset.writer import TarWriter

from deepclust.clustering.statistics import describe
from deepclust.data.shards.index import Index, open_index
from deepclust.files import append_json, write_json
from deepclust.recipe import Recipe
from deepclust.run.directory import create, seal
from tools.bench.serve import memory, served, timed

SHARD, KINDS, CLASSES, DIM = 10_000, 1000, 10, 64
MOVED = 0.2  # share of the images that change cluster in a round
NAME = "million"


def main() -> None:
    """Make the run unless it is there, and time its pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=1000)
    args = parser.parse_args()
    run = args.out / "runs" / NAME
    if not (run / "recipe.yaml").exists():
        write_shards(args.out / "shards", args.samples)
        make_run(run, args.out / "shards", args.k)
    print(json.dumps(measure(args.out / "runs", args.samples), indent=2))


def write_shards(folder: Path, samples: int) -> None:
    """Write labelled images, the same 1,000 again and again, each under its own key."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    bodies = [_jpeg(draw.integers(0, 256, (28, 28, 3), np.uint8)) for _ in range(KINDS)]
    for number, first in enumerate(range(0, samples, SHARD)):
        with TarWriter(str(folder / f"part-{number:05d}.tar"), encoder=False) as tar:
            for i in range(first, min(first + SHARD, samples)):
                label = str(i % CLASSES).encode()
                tar.write({"__key__": f"{i:08d}", "jpg": bodies[i % KINDS], "cls": label})


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def make_run(folder: Path, shards: Path, k: int) -> None:
    """Write a finished run of three rounds, of which the last has its features."""
    keys = [f"data.shards={shards}", "data.size=28", "data.resize=28", f"cluster.k={k}"]
    create(folder, Recipe.load("small-photos", *keys, f"cluster.dim={DIM}", "train.epochs=3"))
    index = open_index(shards)
    record = {"fingerprint": index.fingerprint, "n": len(index), "shards": len(index.shards)}
    write_json(folder / "data.json", {**record, "read": "offset"})
    _event(folder, event="started")
    before = None
    for number in range(3):
        before = _round(folder, index, number, k, before)
    _event(folder, event="finished", epochs=3)


def _event(folder: Path, **fields: Any) -> None:
    append_json(folder / "events.jsonl", {"time": time.time(), "attempt": 1, **fields})


def _round(
    folder: Path, index: Index, number: int, k: int, before: np.ndarray | None
) -> np.ndarray:
    """Write a round, whose images mostly stay in the cluster that they had."""
    draw, n = np.random.default_rng(number), len(index)
    drawn = draw.integers(0, k, n, np.int32)
    stays = draw.random(n) > MOVED
    assignments = drawn if before is None else np.where(stays, before, drawn)
    stage = folder / "rounds" / f"{number:04d}"
    inputs = {"data": index.fingerprint, "round": number, "k": k}
    for name in ("features", "centroids", "assignments"):
        (stage / name).mkdir(parents=True)
    centres = draw.standard_normal((k, DIM), np.float32)
    np.save(stage / "centroids" / "centroids.npy", centres[None])
    if number == 2:
        _rows(stage / "features" / "rows.npy", centres, assignments, draw)
    nobody = pa.table({"sample_id": pa.array([], pa.int64()), "reason": pa.array([], pa.string())})
    pq.write_table(nobody, stage / "features" / "excluded.parquet")
    pq.write_table(nobody, stage / "assignments" / "excluded.parquet")
    np.save(stage / "assignments" / "assignments.npy", assignments[None])
    np.save(stage / "assignments" / "distances.npy", draw.random((1, n), np.float32))
    facts = describe(assignments, k, previous=before, classes=index.labels)
    facts |= {"round": number, "inertia": 0.5, "forced": 0, "seconds": 1.0}
    write_json(stage / "assignments" / "statistics.json", facts)
    for name in ("features", "centroids", "assignments"):
        seal(stage / name, inputs)
    _event(folder, event="clustered", **facts)
    return assignments


def _rows(path: Path, centres: np.ndarray, assignments: np.ndarray, draw: Any) -> None:
    """Write the features, some at a time."""
    shape = (len(assignments), DIM)
    rows = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    for first in range(0, len(rows), 2**16):
        part = assignments[first : first + 2**16]
        near = centres[part] + 0.3 * draw.standard_normal((len(part), DIM), np.float32)
        rows[first : first + len(part)] = near / np.linalg.norm(near, axis=1, keepdims=True)
    rows.flush()


def measure(runs: Path, samples: int) -> dict[str, Any]:
    """Time the pages of the run, and the server's memory at its start and at its peak."""
    here, middle = f"/api/runs/{NAME}", samples // 2
    paths = {
        "list": "/api/runs", "run": f"/runs/{NAME}", "clusters": f"/runs/{NAME}/clusters",
        "clusters by drift": f"{here}/clusters?sort=drift", "a class": f"{here}/clusters?text=3",
        "a cluster": f"/runs/{NAME}/clusters/7", "borderline": f"{here}/clusters/7/borderline",
        "duplicates": f"{here}/clusters/7/duplicates", "lineage": f"{here}/clusters/7/lineage",
        "picture": f"{here}/images/{middle}/picture", "key": f"{here}/search?key={middle:08d}",
        "neighbours": f"{here}/images/{middle}/neighbours",
        "neighbours of all": f"{here}/images/{middle}/neighbours?within=all",
        "map": f"{here}/map", "report": f"/runs/{NAME}/report",
    }  # fmt: skip
    with served(runs) as (address, pid):
        start, rows = memory(pid), {}
        for name, path in paths.items():
            first = timed(address, path, 1)
            then = timed(address, path, 1 if first > 10 else 3)
            rows[name] = {"first_s": first, "then_s": then, "peak_mb": round(memory(pid))}
            print(f"{name:20}{first:8.3f} s{then:8.3f} s{memory(pid):8.0f} MB", file=sys.stderr)
    return {"samples": samples, "start_mb": round(start), "pages": rows}


if __name__ == "__main__":
    main()
