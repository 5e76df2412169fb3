"""What readers save when crops are made on the device: `python tools/bench/device_crops.py`.

Times, an image: the CPU's crop; `pack`, which a reader does instead; and the crop on the device
with the copy of the whole image (a GPU only). The images are noise of ImageNet's usual size.

With `--photos SHARDS` it compares pixels instead: two random crops and a centre crop of the first
`--count` photos, as readers make them and as the device does. It ends with 1 if one pixel differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from deepclust.data.images.crops import CentreCrop, Crop, RandomResizedCrop
from deepclust.data.images.device_crops import crop, cut_of, pack
from deepclust.data.read.dataset import Batches, Request
from deepclust.data.shards.index import open_index


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of some repeats."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def differing(shards: str, count: int, size: int) -> int:
    """Compare both ways on photos, print how many values differ, and return that number."""
    views = (RandomResizedCrop(size), RandomResizedCrop(size // 2, (0.05, 0.3)),
             CentreCrop(size, size * 256 // 224))  # fmt: skip
    index = open_index(shards)
    count = min(count, len(index))
    ids, batches, device = np.arange(count), Batches(index), torch.device("cpu")
    device = torch.device("cuda") if torch.cuda.is_available() else device
    differ = total = 0
    for part in np.array_split(ids, max(1, count // 64)):
        asked = Request(part, part, 7, tuple(map(Crop, views)))
        made = batches[asked].images
        later = batches[replace(asked, packed=True)].images
        for crops, boxes in zip(made, later, strict=True):
            total += crops.numel()
            differ += int((crop(boxes.to(device)).cpu() != crops).sum())
    print(f"{count} photos, three crops each: {differ} of {total} values differ on {device}")
    return differ


def main() -> None:
    """Print one line a way, or compare pixels."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in {"batch": 64, "height": 375, "width": 500, "size": 224}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--photos", help="shards whose photos are compared")
    parser.add_argument("--count", type=int, default=1000)
    asked = parser.parse_args()
    if asked.photos:
        sys.exit(differing(asked.photos, asked.count, min(asked.size, 96)) > 0)
    torch.set_num_threads(1)
    shape = (asked.height, asked.width, 3)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8).permute(2, 0, 1)] * asked.batch
    view = RandomResizedCrop(asked.size)
    draws = view.draws(0, np.arange(asked.batch))
    cuts = [cut_of(view, asked.height, asked.width, draw) for draw in draws]
    packed = pack(images, cuts, asked.size)
    ways: dict[str, Callable[[], object]] = {
        "crop on the CPU": lambda: [view(x, d) for x, d in zip(images, draws, strict=True)],
        "pack for a device": lambda: pack(images, cuts, asked.size),
    }
    if torch.cuda.is_available():
        pinned, device = packed.pin_memory(), torch.device("cuda")
        ways["copy and crop on the device"] = lambda: crop(pinned.to(device))
    for name, way in ways.items():
        print(f"{1e3 * seconds(way) / asked.batch:.3f} ms an image: {name}")
    if not torch.cuda.is_available():
        print("copy and crop on the device: torch sees no CUDA device here")


if __name__ == "__main__":
    main()
