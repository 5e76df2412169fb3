"""Seconds and GB/s of an all-reduce on two GPUs by NCCL: `python tools/bench/nccl.py`.

The sizes are the gradients of ResNet-50 and of AlexNet with 10,000 clusters, float32. GB/s is that
of the algorithm: bytes over seconds. Without two GPUs it says so and exits with 4. `--device cpu`
tries the code by gloo, and its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing

from deepclust.world import World, close_process_group, join

NUMBERS = {"resnet50": 25_557_032, "alexnet, k=10000": 99_000_000}
REPEATS = 10


def main(words: list[str] | None = None) -> int:
    """Start two ranks, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--numbers", type=int, nargs="+", default=list(NUMBERS.values()))
    asked = parser.parse_args(words)
    if asked.device == "cuda" and torch.cuda.device_count() < 2:
        print(f"nccl: needs two GPUs, torch sees {torch.cuda.device_count()}", file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory() as folder:
        given = (asked.device, asked.numbers, str(Path(folder, "rendezvous")))
        torch.multiprocessing.spawn(rank_of, given, nprocs=2)
    return 0


def rank_of(rank: int, kind: str, numbers: list[int], rendezvous: str) -> None:
    """Time all sizes on one of the ranks; the first prints."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    world = join(rank, 2, rendezvous, device, 60)
    for count in numbers:
        seconds = fastest(world, torch.ones(count, device=device))
        if world.is_first:
            print(
                f"{count:>12,} numbers {seconds * 1e3:9.3f} ms {4e-9 * count / seconds:8.2f} GB/s"
            )
    close_process_group()


def fastest(world: World, values: torch.Tensor) -> float:
    """The shortest of some all-reduces, after one in which NCCL connects."""
    times = []
    for _ in range(REPEATS):
        world.barrier()
        began = time.perf_counter()
        world.all_reduce(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())
