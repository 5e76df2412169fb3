#!/usr/bin/env python3
"""DeeperCluster's packed sub-head: its memory by formula and measured, and the time of a step.

    nice -n 10 python tools/bench/subhead.py [--rounds 2] [--json FILE]

Every case has fresh processes (gloo ranks, one thread each), and the cases take turns. Memory is
RssAnon above its value before the head was made: the peak in three steps of SGD with momentum, and
what is left after them, gradients included, while malloc gives large blocks back at once (glibc's
habit of keeping some adds 70 MB at one rank; MKL's scratch, 9 MB there, does count). Then come five
timed steps, unwatched. The peer is the same loss by `weight[s]` of every super-class that is there,
through plain autograd. At last the formula of `parts/sharded_head.py` for the paper's size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/bench/clustering")]

import processes  # noqa: E402
import report  # noqa: E402
from memory import Peak, anonymous  # noqa: E402

from deepclust.methods.parts.sharded_head import SubHead  # noqa: E402
from deepclust.world import World, close_process_group, join  # noqa: E402

WATCHED, TIMED = 3, 5  # steps
MMAP_THRESHOLD, AT_ONCE, USUAL = -3, 1 << 16, 1 << 25  # mallopt's; glibc raises its own to USUAL


class Size(NamedTuple):
    """S super-classes of k_s sub-clusters, D features, G rows in a step."""

    S: int
    k_s: int
    D: int
    G: int


class Case(NamedTuple):
    """Who computes the loss, on how many ranks."""

    name: str
    ranks: int = 1
    decay: float = 0.0


TINY, SCALED, PAPER = Size(2, 6, 8, 6), Size(16, 4_000, 1024, 192), Size(16, 80_000, 4096, 3072)
INDEXED = Case("indexed")
CASES = [*(Case("packed", ranks) for ranks in (1, 2, 3)), Case("with decay", 1, 1e-5), INDEXED]


def formula(size: Size, ranks: int, e: int = 4) -> dict[str, float]:
    """GB on a rank, and GB that it sends in a step; e bytes in a number of the product."""
    own = math.ceil(size.k_s / ranks)
    S, _, D, G = size
    found = {
        "weights, gradients, momentum": 12 * S * own * (D + 1),
        "SGD's copy (weight decay)": 4 * S * own * (D + 1),  # torch's makes it of each tensor
        "forward to backward": e * G * (D + own),
        "while it works, at most": 12 * G * own + 4 * G * D + 2 * e * own * D,
        "sent": (ranks - 1) / ranks * G * (e * D + 16 + 2 * 4 + 2 * 8 + 4 * D),
    }
    return {name: count / 1e9 for name, count in found.items()}


def main() -> None:
    """Measure in turn, print the tables, write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of every case")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    found = {"machine": processes.machine(), "scaled": SCALED._asdict(), "paper": PAPER._asdict()}
    runs = [(case, spawned(case)) for _ in range(options.rounds) for case in CASES]
    found["runs"] = [{**case._asdict(), "each": each} for case, each in runs]
    found["measured"] = [line(case, [each for of, each in runs if of == case]) for case in CASES]
    found["formula"] = [
        {"ranks": ranks, "product": product}
        | {f"{name}, GB": f"{value:.3f}" for name, value in formula(PAPER, ranks, e).items()}
        for ranks in (64, 8, 1)
        for product, e in {"fp32": 4, "bf16": 2}.items()
    ]
    found["load_after"] = os.getloadavg()
    print(f"{SCALED}; load {found['machine']['load_before']} before, {found['load_after']} after\n")
    print(f"{report.markdown(found['measured'])}\n\n{PAPER}, of a rank, by formula\n")
    print(report.markdown(found["formula"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def spawned(case: Case) -> list[dict]:
    """What each rank found, in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(case.ranks, mp_context=spawn) as pool,
    ):
        jobs = [pool.submit(one_rank, case, rank, Path(folder, "0")) for rank in range(case.ranks)]
        return [job.result() for job in jobs]


def one_rank(case: Case, rank: int, rendezvous: Path) -> dict:
    """Bytes and seconds of this rank, and the loss of all rows in the last step."""
    torch.set_num_threads(1)
    world, libc = join(rank, case.ranks, rendezvous, torch.device("cpu"), 60), ctypes.CDLL(None)
    next(steps(case, TINY, world))  # what the first step loads does not count
    libc.mallopt(MMAP_THRESHOLD, AT_ONCE)
    with Peak() as peak:
        training = steps(case, SCALED, world)
        for _ in range(WATCHED):
            next(training)
        left = anonymous(os.getpid()) - peak.before
    libc.mallopt(MMAP_THRESHOLD, USUAL)
    seconds = []
    for _ in range(TIMED):
        world.barrier()
        began = time.perf_counter()
        loss = next(training)
        seconds.append(time.perf_counter() - began)
    mean = world.all_reduce(loss).item() / world.size
    world.barrier()
    close_process_group()
    return {"peak": peak.bytes, "left": left, "seconds": seconds, "loss": mean}


def steps(case: Case, size: Size, world: World) -> Iterator[Tensor]:
    """Step after step on one batch, features' gradient included; yields this rank's loss."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(size.G, size.D, generator=random).relu_()
    classes = [torch.randint(n, (size.G,), generator=random) for n in (size.S, size.k_s)]
    features, s, z = (part.tensor_split(world.size)[world.rank] for part in (rows, *classes))
    features.requires_grad_()
    head = SubHead(size.D, size.S, size.k_s, world, seed=0)
    optimizer = torch.optim.SGD(head.parameters(), 0.05, 0.9, weight_decay=case.decay)
    while True:
        optimizer.zero_grad(set_to_none=True)
        features.grad = None
        loss = indexed(head, features, s, z) if case == INDEXED else head(features, s, z)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def indexed(head: SubHead, features: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """The same loss on one rank, as one would write it first."""
    total = features.new_zeros(())
    for i in s.unique().tolist():
        logits = F.linear(features[s == i], head.weight[i], head.bias[i])
        total = total + F.cross_entropy(logits, z[s == i], reduction="sum")
    return total / len(s)


def line(case: Case, rounds: list[list[dict]]) -> dict:
    """Memory of the rank that had most, seconds of the one that was last; medians over rounds."""
    left, peak = (median(max(r[key] for r in each) for each in rounds) for key in ("left", "peak"))
    seconds = [median(map(max, zip(*(r["seconds"] for r in each), strict=True))) for each in rounds]
    held, copy, kept, working, _ = (1e3 * gb for gb in formula(SCALED, case.ranks).values())
    most, ours = held + max(kept + working, copy if case.decay else 0), case != INDEXED
    return {
        "sub-head": case.name, "ranks": case.ranks,
        "left, MB": f"{left / 1e6:.0f}", "formula": f"{held:.0f}" if ours else "",
        "peak, MB": f"{peak / 1e6:.0f}", "formula, at most": f"{most:.0f}" if ours else "",
        "step, s": report.spread(seconds), "loss": f"{rounds[0][0]['loss']:.6f}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
