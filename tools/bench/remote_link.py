"""Read shards through a link with the latency of object storage: does training wait for it?

    python tools/bench/remote_link.py --out tools/bench/measured/remote.json

The links have 100 MB/s and 1 Gbit/s, and a round trip of 50 ms (`link.py`). Photos are noise of
256 x 256, with a comment that makes 440 kB of each: so the link is the limit, and not the decoders
of two cores. The ways, each a process of its own, in turns:
- `stream` takes all bytes, a shard after another, and decodes nothing;
- `ahead` does so with requests for the shards to come (`pieces_ahead.py`);
- `copy` copies shards ahead as block reading does, and decodes nothing;
- `train` takes batches by block, and holds each as long as a step does that takes `--pace` of the
  images/s which the link allows;
- `stage` copies all shards first (data.stage), and trains from the copies at that pace.
`first_s` is until the first batch, with the start of the readers. Waited is the share of the time
after it that the loader kept its consumer waiting. CPU is core-seconds of the reading processes.
`--before` is another checkout, whose ways take turns with ours.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, os.environ.get("TREE") or str(Path(__file__).parents[2]))
from link import ADDRESS, link

from tests.data.shards.servers import web

LINKS = {"100 MB/s": 100e6, "1 Gbit/s": 125e6}
ROUND_TRIP_S = 0.05
BATCH, IMAGE_BYTES = 32, 440_000
COLUMNS = ("first_s", "images_per_s", "MB_per_s", "waited", "requests", "cpu_s")


def make(folder: Path, shards: int, per_shard: int) -> None:
    """Write shards of the same 100 photos, each padded to its size, under new keys."""
    import torch

    from tests.images import encode, write_tar

    draws = np.random.default_rng(0)
    coarse = torch.from_numpy(draws.integers(0, 256, (100, 3, 64, 64), dtype=np.uint8))
    photos = [
        padded(encode(one.repeat_interleave(4, 1).repeat_interleave(4, 2), "jpg", quality=90))
        for one in coarse
    ]
    for shard in range(shards):
        members = [(f"{i:06d}.jpg", photos[i % 100]) for i in range(per_shard)]
        write_tar(folder / f"shard-{shard:06d}.tar", members)


def padded(jpeg: bytes) -> bytes:
    """Return the JPEG with comments after its first marker, `IMAGE_BYTES` in all."""
    missing, comments = IMAGE_BYTES - len(jpeg), b""
    while missing > 4:
        size = min(missing - 2, 65_535)
        comments += b"\xff\xfe" + size.to_bytes(2, "big") + bytes(size - 2)
        missing -= size + 2
    return jpeg[:2] + comments + jpeg[2:]


@contextlib.contextmanager
def served(folder: Path, before: list[str]) -> Iterator[tuple[str, Callable[[], int]]]:
    """Serve the folder at the far end; yield the URL, and what counts requests since the last."""
    command = [*before, sys.executable, __file__, "--serve", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server:
        url = server.stdout.readline().strip()

        def count() -> int:
            server.stdin.write("\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        try:
            yield url, count
        finally:
            server.kill()


def serve(folder: Path) -> None:
    """Serve the folder, and answer each line of the input with the requests since the last."""
    os.nice(-20)  # it stands for another machine
    with web(folder, ADDRESS["far"]) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(len(server.asked), flush=True)
            server.asked.clear()


def one(kind: str, url: str, folder: Path, pace: float, workers: int) -> dict[str, float]:
    """Read all images in one way, in this process."""
    from deepclust.data.shards.index import open_index

    index = open_index(url, folder / "index")
    size, began = sum(index.lengths) / 1e6, time.perf_counter()
    if kind in ("stream", "ahead"):
        return {"MB_per_s": size / taken(index, kind)}
    from deepclust.data.read.mirror import mirror_shards

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if kind == "copy":
            return {"MB_per_s": size / copy(index, Path(scratch))}
        if kind == "train":
            return images(index, "block", workers, Path(scratch), pace)
        index = mirror_shards(index, scratch)
        staged = time.perf_counter() - began
        told = images(index, "offset", workers, Path(scratch), pace)
        return told | {"first_s": told["first_s"] + staged, "MB_per_s": size / staged}


def taken(index, kind: str) -> float:
    """Return the seconds until all bytes have come, shard after shard or asked for ahead."""
    from deepclust.data.read.pieces_ahead import PiecesAhead
    from deepclust.data.shards import remote

    ahead, began = PiecesAhead(index, remote.never), time.perf_counter()
    for number, shard in enumerate(index.shards):
        if kind == "ahead":
            ahead.want(range(number, min(number + 8, len(index.shards))))
            pieces = ahead.take(number)
        else:
            pieces = remote.stream(shard, 0, shard.size)
        assert sum(len(piece) for piece in pieces) == index.lengths[number]
    seconds = time.perf_counter() - began
    ahead.close()
    return seconds


def requests(index) -> Iterator:
    """Yield the requests of an epoch, in lanes of shards, as block reading has them."""
    from deepclust.data.images.crops import Crop, RandomResizedCrop
    from deepclust.data.plan import EpochPlan
    from deepclust.data.read.loader import Request

    nothing, crops = np.zeros(len(index), np.int32), (Crop(RandomResizedCrop(96)),)
    plan = EpochPlan.build(nothing, 0, 0, global_batch=BATCH, lanes=4, blocks=index.bases)
    for ids in plan.for_rank(0, 1):
        yield Request(ids, ids, 0, crops)


def copy(index, scratch: Path) -> float:
    """Return the seconds until the shards of all requests are copied."""
    from deepclust.data.read.shard_cache import ShardCache

    cache, began = ShardCache(index, scratch), time.perf_counter()
    for _ in cache.stream(requests(index)):
        cache.release_oldest()
    seconds = time.perf_counter() - began
    cache.close()
    return seconds


def images(index, read: str, workers: int, scratch: Path, pace: float) -> dict[str, float]:
    """Take all batches, and hold each as long as `pace` images/s ask for."""
    from deepclust.data.read.loader import Loader

    loader, began = Loader(index, workers, read=read, scratch=scratch), time.perf_counter()
    stream = loader.stream(requests(index))
    first = next(stream)
    arrived, early, count = time.perf_counter(), loader.waited, 0
    for loaded in itertools.chain([first], stream):
        time.sleep(len(loaded.sample_ids) / pace)
        count += len(loaded.sample_ids)
    seconds = time.perf_counter() - arrived
    told = {"first_s": arrived - began, "images_per_s": count / seconds,
            "waited": (loader.waited - early) / seconds}  # fmt: skip
    loader.close()
    return told


def cpu_s() -> float:
    """Return the core-seconds of this process and its children that have ended."""
    own, others = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Let the ways to read take turns on each link."""
    make(folder / "shards", args.shards, args.per_shard)
    turns = []
    for name in [name for _ in range(args.turns) for name in args.links]:
        with (
            link(LINKS[name], ROUND_TRIP_S) as at,
            served(folder / "shards", at["far"]) as (url, asked),
        ):
            pace = args.pace * LINKS[name] / IMAGE_BYTES
            child(at["near"], args, ["stream", url, str(folder), str(pace)])  # it makes the index
            for kind, tree in ways(args):
                asked()
                told = child(at["near"], args, [kind, url, str(folder), str(pace)], tree)
                way = f"{kind}, before" if tree else kind
                turns.append({"link": name, "way": way, "requests": asked()} | told)
                print(turns[-1], flush=True)
    return turns


def ways(args: argparse.Namespace) -> list[tuple[str, Path | None]]:
    """Return each way with ours, and after it with the other checkout, if there is one."""
    trees = [None, args.before] if args.before else [None]
    return [(kind, tree) for kind in args.kinds for tree in trees]


def child(before: list[str], args: argparse.Namespace, words: list[str], tree=None) -> dict:
    """Run one way in a process at the near end, with the code of a tree."""
    place = str(tree or Path(__file__).parents[2])
    done = subprocess.run(
        [*before, sys.executable, __file__, "--one", *words, str(args.workers)],
        stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"TREE": place, "PYTHONPATH": place},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def table(turns: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the medians of each link and way, as Markdown."""
    lines = [f"| link | way | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name in args.links:
        for kind in dict.fromkeys(turn["way"] for turn in turns):
            own = [turn for turn in turns if (turn["link"], turn["way"]) == (name, kind)]
            cells = [
                f"{median(turn[column] for turn in own):.3g}" if column in own[0] else ""
                for column in COLUMNS
            ]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", default=["stream", "ahead", "copy", "train", "stage"])
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--per-shard", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--pace", type=float, default=0.8, help="of what the link allows")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.one:
        kind, url, folder, pace, workers = args.one
        told = one(kind, url, Path(folder), float(pace), int(workers))
        print(json.dumps(told | {"cpu_s": cpu_s()}))
        return None
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(args, Path(folder))
    print(table(turns, args))
    if args.out:
        facts = {"shards": args.shards, "per_shard": args.per_shard, "image_bytes": IMAGE_BYTES,
                 "workers": args.workers, "pace": args.pace, "load": os.getloadavg()}  # fmt: skip
        args.out.write_text(json.dumps({"facts": facts, "turns": turns}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
