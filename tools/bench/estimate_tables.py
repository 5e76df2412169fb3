#!/usr/bin/env python3
"""The estimates of the large recipes on 8 and 64 H100, as the tables of a guide.

    python tools/bench/estimate_tables.py [--device h100] [--ranks 8 64]

Nothing is measured: `deepclust estimate RECIPE --device h100 --samples N` gives each number, with
the assumptions below the tables. Each row keeps the recipe's batch, so that 64 GPUs have an eighth
of the work of 8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster_jobs.estimate import Estimate, estimate  # noqa: E402
from cluster_jobs.estimate.devices import DEVICES, device_of  # noqa: E402
from deepclust.recipe import Recipe  # noqa: E402
from deepclust.recipe.recipe import shipped  # noqa: E402

IMAGES = {"imagenet": 1_281_167, "yfcc100m": 95_920_149}
READERS = 12  # of a rank: 96 cores for 8 GPUs


def main() -> None:
    """Print a table for each number of ranks, then what is assumed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    args = parser.parse_args()
    for ranks in args.ranks:
        print(f"\n{ranks} x {args.device}\n")
        for line in table(args.device, ranks):
            print(line, flush=True)
    print("\nAssumed:\n")
    for text in assumed(args.device, args.ranks[0]):
        print(f"- {text}")


def table(device: str, ranks: int) -> Iterator[str]:
    """Yield the lines of a table, a row for each recipe."""
    yield "| recipe | hours | GPU-hours | training | extraction | GPU memory | disk at most |"
    yield "|---|---|---|---|---|---|---|"
    for name, samples in large():
        yield _row(name, made(name, samples, device, ranks))


def large() -> list[tuple[str, int]]:
    """Return the shipped recipes of large data, each with its number of images."""
    return [(name, n) for name in shipped() for end, n in IMAGES.items() if name.endswith(end)]


def made(name: str, samples: int, device: str, ranks: int) -> Estimate:
    """Return the estimate of a recipe on so many ranks, whose clustering has no GPU of its own."""
    keys = ["data.shards=not-read", f"train.ranks={ranks}", f"data.workers={READERS}"]
    recipe = Recipe.load(name, *keys)
    if recipe.cluster is not None:
        recipe = recipe.replace("cluster.where=ranks")
    return estimate(recipe, samples, device_of(device))


def _row(name: str, one: Estimate) -> str:
    shares = [one.seconds.get(stage, 0.0) / one.total for stage in ("training", "extraction")]
    cells = [
        f"`{name}`", f"{one.total / 3600:,.1f}", f"{one.gpu_hours:,.0f}",
        *(f"{share:.0%}" for share in shares),
        f"{max(stage.device for stage in one.stages) / 1e9:,.1f} GB",
        f"{one.sizes.disk_peak / 1e9:,.1f} GB",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def assumed(device: str, ranks: int) -> Sequence[str]:
    """Return the assumptions, which are the same for every recipe."""
    name, samples = large()[0]
    return made(name, samples, device, ranks).assumptions


if __name__ == "__main__":
    main()
