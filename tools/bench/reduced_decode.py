#!/usr/bin/env python3
"""Images per second with `data.decode=reduced` against `cpu`, and how far apart their crops are.

    python tools/bench/reduced_decode.py --photos FOLDER --out tools/bench/measured/reduced.json

Random resized crops (scale 0.08 to 1, flip) are made by one process, as a reader does it. Each run
is a process of its own, and the two decoders take turns. Photos are small ones made larger, with
grain of 4 levels, because what a decoder costs depends on the detail that was stored. "apart" is
the mean difference of the same crops in levels of 255, over those that were reduced; part of it is
that a crop's edges fall on pixels of the smaller image.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

SIZES = {
    "500x375": (64, (500, 375)),
    "1600x1200": (24, (1600, 1200)),
    "4000x3000": (8, (4000, 3000)),
}
CROPS = (96, 224)
DECODERS = ("cpu", "reduced")
SECONDS = 4.0


def main() -> None:
    """Measure all sizes in turns, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder with JPEGs, searched through")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(Path(args.one[0]), int(args.one[1]), args.one[2])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (count, size) in SIZES.items():
            shard = write_shard(args.photos, Path(folder, name), count, size)
            rows += [measured(shard, name, crop, args.pairs) for crop in CROPS]
    print("| photos | crop | cpu, images/s | reduced | ratio | crops reduced | apart |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['photos']} | {row['crop']} | {row['cpu']:.0f} | {row['reduced']:.0f} | "
            f"{row['ratio']:.2f} | {row['share']:.0%} | {row['apart']:.1f} |"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def write_shard(photos: Path, folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write a shard of `count` photos of this size."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, file in enumerate(files[:: max(1, len(files) // count)][:count]):
            large = Image.open(file).convert("RGB").resize(size, Image.Resampling.BICUBIC)
            grain = noise.normal(0, 4, (size[1], size[0], 3))
            pixels = np.rint(np.asarray(large) + grain).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{i:05d}.jpg")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return folder


def measured(shard: Path, name: str, crop: int, pairs: int) -> dict[str, object]:
    """Return medians of interleaved runs of both decoders, and how far apart their crops are."""
    found: dict[str, list[float]] = {decoder: [] for decoder in DECODERS}
    for _ in range(pairs):
        for decoder in DECODERS:
            command = [sys.executable, __file__, "--one", str(shard), str(crop), decoder]
            found[decoder].append(json.loads(subprocess.check_output(command))["images/s"])
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    speeds = {decoder: median(each) for decoder, each in found.items()}
    share, apart = difference(shard, crop)
    return {
        "photos": name, "crop": crop, **speeds, "ratio": median(ratios), "ratios": ratios,
        "share": share, "apart": apart,
    }  # fmt: skip


def one(shard: Path, crop: int, decoder: str) -> dict[str, float]:
    """Return the images a second of one decoder, for some seconds after a first pass."""
    from deepclust import open_index
    from deepclust.data.read.dataset import Batches

    index = open_index(shard)
    batches, count = Batches(index, decoder=decoder), len(index)
    batches[request(count, crop, 0)]
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        passes += 1
        batches[request(count, crop, passes)]
    return {"images/s": count * passes / (time.perf_counter() - started)}


def request(count: int, crop: int, epoch: int) -> object:
    """Return the request for all images with the crops of an epoch."""
    from deepclust.data.images.crops import Crop, RandomResizedCrop
    from deepclust.data.read.dataset import Request

    ids = np.arange(count)
    return Request(ids, ids + epoch * count, 0, (Crop(RandomResizedCrop(crop)),))


def difference(shard: Path, crop: int) -> tuple[float, float]:
    """Return the share of crops that were reduced, and their mean difference in levels."""
    from deepclust import open_index
    from deepclust.data.read.dataset import Batches

    index = open_index(shard)
    apart = []
    for epoch in range(4):
        asked = request(len(index), crop, epoch)
        both = [Batches(index, decoder=decoder)[asked].images[0].int() for decoder in DECODERS]
        apart += (both[0] - both[1]).abs().float().mean((1, 2, 3)).tolist()
    reduced = [one for one in apart if one > 0]
    return len(reduced) / len(apart), sum(reduced) / max(1, len(reduced))


if __name__ == "__main__":
    main()
