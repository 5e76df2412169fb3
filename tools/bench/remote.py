"""Compare reading shards from a web server with reading them from this disk.

    python tools/bench/remote.py --out remote.json

The server is a Python process on loopback (`tests/data/shards/servers.py`), so the figures show
the cost of our client and of HTTP, not of a network. `copy` reads every shard once, as block
reading and data.stage do. `images` are batches of the loader over a plan in lanes, decoded and
cropped to 96 pixels. Contenders take turns, and a figure is the median. Photos are noise of
256 x 256, about 45 kB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.data.shards.servers import web
from tests.images import encode, write_tar

BATCH = 64


def make(folder: Path, shards: int, per_shard: int) -> None:
    """Write shards of the same 200 photos under new keys."""
    import torch

    draws = np.random.default_rng(0)
    coarse = torch.from_numpy(draws.integers(0, 256, (200, 3, 64, 64), dtype=np.uint8))
    photos = [
        encode(photo.repeat_interleave(4, 1).repeat_interleave(4, 2), "jpg", quality=90)
        for photo in coarse
    ]
    for shard in range(shards):
        members = [(f"{i:06d}.jpg", photos[i % 200]) for i in range(per_shard)]
        write_tar(folder / f"shard-{shard:06d}.tar", members)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the folder by another process, and yield its URL."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def serve(folder: Path) -> None:
    """Serve the folder until the process is killed."""
    with web(folder) as server:
        print(server.url, flush=True)
        time.sleep(10_000)


def copy(shards: list) -> float:
    """Return the MB/s of reading all shards from first to last byte."""
    from deepclust.data.shards import remote
    from deepclust.data.shards.url import Url

    began, total = time.perf_counter(), 0
    for shard in shards:
        if isinstance(shard, Url):
            total += sum(len(piece) for piece in remote.stream(shard, 0, shard.size))
            continue
        with open(shard, "rb", buffering=0) as file:
            while piece := file.read(remote.CHUNK):
                total += len(piece)
    return total / 1e6 / (time.perf_counter() - began)


def images(index, read: str, workers: int, scratch: Path) -> float:
    """Return the images/s from the first batch to the last."""
    from deepclust.data.images.crops import Crop, RandomResizedCrop
    from deepclust.data.plan import EpochPlan
    from deepclust.data.read.loader import Loader, Request

    n = len(index)
    plan = EpochPlan.build(
        np.zeros(n, np.int32), 0, 0, global_batch=BATCH, lanes=4, blocks=index.bases
    )
    loader = Loader(index, workers, read=read, scratch=scratch)
    asked = (Request(ids, ids, 0, (Crop(RandomResizedCrop(96)),)) for ids in plan.for_rank(0, 1))
    stream = loader.stream(asked)
    next(stream)
    began = time.perf_counter()
    done = sum(len(loaded.sample_ids) for loaded in stream)
    seconds = time.perf_counter() - began
    loader.close()
    return done / seconds


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Measure all contenders, turn by turn."""
    from deepclust.data.shards.index import open_index

    make(folder / "shards", args.shards, args.per_shard)
    with served(folder / "shards") as url:
        near, far = open_index(folder / "shards"), open_index(url, folder / "index")
        contenders = {
            "copy, disk (MB/s)": lambda: copy(near.shards),
            "copy, http (MB/s)": lambda: copy(far.shards),
            "images by offset, disk (1/s)": lambda: images(near, "offset", args.workers, folder),
            "images by block, disk (1/s)": lambda: images(near, "block", args.workers, folder),
            "images by block, http (1/s)": lambda: images(far, "block", args.workers, folder),
        }
        turns = [{name: run() for name, run in contenders.items()} for _ in range(args.turns)]
    return [
        {"what": name, "median": median(turn[name] for turn in turns),
         "turns": [round(turn[name], 1) for turn in turns]}
        for name in contenders
    ]  # fmt: skip


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--per-shard", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    for row in rows:
        print(f"{row['what']:32}{row['median']:10.1f}   {row['turns']}")
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args), "rows": rows}, default=str))


if __name__ == "__main__":
    main()
