#!/usr/bin/env python3
"""Images per second of training by where JPEGs are decoded and cropped.

    python tools/bench/decode_paths.py --photos FOLDER [--device cpu] [--pairs 3] [--out FILE]

The network is small (conv4) and the crops are large (224), so on a GPU the readers decide. A path
is a setting of the recipe: decode and crop in the readers, crop on the device, decode large files
small, decode on the GPU. Each run is a process of its own, and the paths take turns. Photos are
small ones made larger: 500 x 375 as ImageNet's, 341 x 256 as `pack --resize-short 256` leaves them,
and 1600 x 1200. The table has the median rate, its ratio to the first path within a turn, and the
share of a step in which readers are awaited. Without a GPU the command exits with 4. `--device cpu`
tries the paths that a CPU has, where the network's own time counts too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from reduced_decode import write_shard

PATHS = {
    "cpu": [],
    "crop on the device": ["data.crop_on=device"],
    "reduced": ["data.decode=reduced"],
    "gpu": ["data.decode=gpu"],
}
SIZES = {"500x375": (500, 375), "341x256": (341, 256), "1600x1200": (1600, 1200)}
RECIPE = ("backbone.name=conv4", "data.workers=auto", "train.log=2", "train.warmup=0")
HEADER = "| photos | path | images/s | of the first path | readers awaited |"


def main() -> int:
    """Measure all paths in turns, print the table and write the JSON."""
    args = arguments()
    if args.one:
        print(json.dumps(one(args, *args.one)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("decode_paths: needs a GPU, torch sees none (--device cpu)", file=sys.stderr)
        return 4
    paths = [path for path in PATHS if path != "gpu" or args.device == "cuda"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            shard = write_shard(args.photos, Path(folder, name), args.count, size)
            rows += measured(args, shard, name, paths)
    print(HEADER, "|---" * 5 + "|", sep="\n")
    for row in rows:
        print(
            f"| {row['photos']} | {row['path']} | {row['images/s']:.0f} | {row['ratio']:.2f} | "
            f"{row['waiting']:.0%} |"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder with JPEGs, searched through")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--count", type=int, default=512, help="photos of each size")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4, help="over the photos of one size")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(
    args: argparse.Namespace, shard: Path, name: str, paths: list[str]
) -> list[dict[str, object]]:
    """A row for each path, from interleaved processes."""
    found: dict[str, list[dict[str, float]]] = {path: [] for path in paths}
    for turn in range(args.pairs):
        for path in paths[turn % len(paths) :] + paths[: turn % len(paths)]:
            command = [sys.executable, *sys.argv, "--one", str(shard), path]
            found[path].append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    first = [run["images/s"] for run in found[paths[0]]]
    return [
        {
            "photos": name, "path": path, "rates": [run["images/s"] for run in runs],
            "images/s": median(run["images/s"] for run in runs),
            "ratio": median(run["images/s"] / base for run, base in zip(runs, first, strict=True)),
            "waiting": median(run["waiting"] for run in runs),
        }
        for path, runs in found.items()
    ]  # fmt: skip


def one(args: argparse.Namespace, shard: str, path: str) -> dict[str, float]:
    """Train on a shard by one path; the first line of metrics, with all starts in it, is left."""
    from deepclust import Recipe, pretrain

    settings = (
        f"data.shards={shard}", f"train.batch={args.batch}", f"train.epochs={args.epochs}",
        f"data.size={args.crop}", f"data.resize={args.crop * 8 // 7}",
        f"train.device={args.device}", *RECIPE, *PATHS[path],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain(Recipe.load("simclr-small-photos", *settings), Path(folder, "run"))
        lines = run.metrics("train")[1:]
    return {
        "images/s": median(line["images_per_s"] for line in lines),
        "waiting": median(line["waiting"] for line in lines),
    }


if __name__ == "__main__":
    sys.exit(main())
