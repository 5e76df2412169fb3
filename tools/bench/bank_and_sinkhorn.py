#!/usr/bin/env python3
"""The bank of DeepCluster-v2 and the labels of SeLa at a million samples: memory and time.

    nice -n 10 python tools/bench/bank_and_sinkhorn.py [--samples N] [--ranks 2] [--json FILE]

Every rank is a fresh process (gloo, one thread). Memory is RssAnon above its value before, and so
leaves out the memory-mapped features. malloc gives large blocks back at once. Otherwise glibc keeps
up to 0.6 GB of tiles of 8 MB for later, of which 41 MB are used. Of the bank: what it holds, the
peak of ten steps of 4096 samples, and their time. Of the labels: the peak, and the time of a
Sinkhorn iteration of one head, of which three are done. Of the queues of SwAV and of MoCo v2: what
they hold, at the sizes of the papers. At last the formulas of `parts/bank.py` and
`stages/round_sinkhorn.py` for 1.28M and 100M samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/bench/clustering")]

import processes  # noqa: E402
import report  # noqa: E402
from memory import Peak, anonymous  # noqa: E402

from deepclust.methods.parts.bank import Bank  # noqa: E402
from deepclust.methods.parts.queue import Queue  # noqa: E402
from deepclust.recipe.declare import Refresh  # noqa: E402
from deepclust.recipe.sections import ClusterSection  # noqa: E402
from deepclust.stages import round_sinkhorn  # noqa: E402
from deepclust.stages.round_kmeans import RoundTask  # noqa: E402
from deepclust.world import World, close_process_group, join  # noqa: E402

PARTS, DIM, BATCH, STEPS = 2, 128, 4096, 10  # of DeepCluster-v2 on ImageNet
WIDTH, K, ITERATIONS = 128, 300, 3  # of SeLa, made small for a CPU
MMAP_THRESHOLD, AT_ONCE = -3, 1 << 16  # mallopt's
QUEUES = {"SwAV": (3840, 2 * 128), "MoCo v2": (65536, 128)}  # rows and numbers in each
SELA = {"D": 2048, "k": 3000, "heads": 10}  # of the paper


class Silent:
    """A report that nobody reads."""

    def alive(self) -> None:
        """Drop it."""


def main() -> None:
    """Measure, print the tables, write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    facts = {"machine": processes.machine(), "samples": options.samples, "ranks": options.ranks}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.npy"), options.samples)
        facts["each"] = spawned(options.samples, options.ranks, Path(folder))
    facts["measured"] = [
        {"rank": rank} | {name: f"{value:.3g}" for name, value in each.items()}
        for rank, each in enumerate(facts["each"])
    ]
    facts["formula"] = [formula(n, ranks) for n in (1_281_167, 100_000_000) for ranks in (1, 8, 64)]
    facts["load_after"] = os.getloadavg()
    print(f"{options.samples:,} samples on {options.ranks} ranks\n")
    print(f"{report.markdown(facts['measured'])}\n\nOf a rank, by formula\n")
    print(report.markdown(facts["formula"]))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def formula(n: int, ranks: int) -> dict[str, str | int]:
    """GB on a rank, at the sizes of the papers."""
    numbers = {
        "bank": 2 * n * PARTS * DIM / ranks,
        "gathered in a step": BATCH * (8 + 2 * PARTS * DIM),
        "SeLa's rows on a GPU": 2 * n * SELA["D"] / ranks,
        "SeLa's heads": 4 * SELA["heads"] * SELA["k"] * SELA["D"],
        "work on a tile": 24 * round_sinkhorn.CELLS,
    }
    return {"samples": n, "ranks": ranks} | {
        f"{name}, GB": f"{count / 1e9:.3g}" for name, count in numbers.items()
    }


def write_rows(file: Path, n: int) -> None:
    """Random features, written block by block."""
    rows = np.lib.format.open_memmap(file, "w+", np.float16, (n, WIDTH))
    random = np.random.default_rng(0)
    for start in range(0, n, 2**16):
        block = rows[start : start + 2**16]
        block[:] = random.standard_normal(block.shape, np.float32)
    rows.flush()


def spawned(n: int, ranks: int, folder: Path) -> list[dict[str, float]]:
    """What each rank measured, in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ranks, mp_context=spawn) as pool:
        jobs = [pool.submit(one_rank, n, rank, ranks, folder) for rank in range(ranks)]
        return [job.result() for job in jobs]


def one_rank(n: int, rank: int, ranks: int, folder: Path) -> dict[str, float]:
    """MB and seconds of this rank."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, AT_ONCE)
    world = join(rank, ranks, folder / "rendezvous", torch.device("cpu"), 600)
    found = {**of_bank(n, world), **of_labels(world, folder / "rows.npy"), **of_queues(world)}
    world.barrier()
    close_process_group()
    return found


def of_bank(n: int, world: World) -> dict[str, float]:
    """Steps of a bank, each of a whole batch."""
    before, share = anonymous(os.getpid()), BATCH // world.size
    bank, random = Bank(n, PARTS, DIM, world), torch.Generator().manual_seed(world.rank)
    bank.rows.fill_(1)  # pages that nobody touched are not there
    held, seconds = anonymous(os.getpid()) - before, []
    with Peak() as peak:
        for _ in range(STEPS):
            ids = torch.randint(n, (share,), generator=random)
            rows = torch.randn(PARTS, share, DIM, generator=random)
            world.barrier()
            began = time.perf_counter()
            bank.note(ids, rows)
            bank.flush()
            seconds.append(time.perf_counter() - began)
    return {
        "bank, MB": held / 1e6,
        "by formula, MB": 2 * bank.range.count * PARTS * DIM / 1e6,
        "peak of a step, MB": peak.bytes / 1e6,
        "step, ms": 1e3 * median(seconds),
    }


def of_queues(world: World) -> dict[str, float]:
    """Queues of rows that were all written."""
    found, queues = {}, []
    for name, (size, dim) in QUEUES.items():
        before = anonymous(os.getpid())
        queues.append(Queue(size, dim, world))
        queues[-1].rows.fill_(1)
        found[f"queue of {name}, MB"] = (anonymous(os.getpid()) - before) / 1e6
    return found


def of_labels(world: World, file: Path) -> dict[str, float]:
    """Labels of one head, from scores that are computed again in every iteration."""
    round_sinkhorn.ITERATIONS, round_sinkhorn.TOLERANCE = ITERATIONS, 0.0
    rows = np.load(file, mmap_mode="r")
    random = torch.Generator().manual_seed(0)
    scorer = {
        "weight": torch.randn(1, K, WIDTH, generator=random) / WIDTH**0.5,
        "bias": torch.zeros(1, K),
    }
    task = RoundTask(
        rows, np.arange(len(rows)), ClusterSection(k=K), Refresh(kind="sinkhorn", whiten=False),
        None, (0,), world.device, world, Silent(), lambda head, passes: None, scorer=scorer,
    )  # type: ignore[arg-type]  # fmt: skip
    began = time.perf_counter()
    with Peak() as peak:
        (clusters,), _ = round_sinkhorn.label_round(task)
    passes = ITERATIONS + 3  # two to begin, one for the labels
    return {
        "labels' peak, MB": peak.bytes / 1e6,
        "n x k float32, MB": 4 * len(rows) * K / 1e6,
        "iteration, s": (time.perf_counter() - began) / passes,
        "imbalance": clusters.facts["imbalance"],
    }


if __name__ == "__main__":
    main()
