#!/usr/bin/env python3
"""DeeperCluster's packed sub-head: its memory by formula and measured, and the time of a step.

    nice -n 10 python tools/bench/subhead.py [--rounds 2] [--json FILE]

Every case has fresh processes (gloo ranks, one thread each), and the cases take turns. Memory is
RssAnon above its value before the head was made: the peak in three steps of SGD with momentum, and
what is left after them, gradients included; then come five steps that are timed, unwatched. The
peer is the same loss by `weight[s]` of every super-class that is there, through plain autograd.
At last the formula of `deepclust/models/subhead.py` for the paper's size.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/bench/clustering")]

import processes  # noqa: E402
import report  # noqa: E402
from memory import Peak, anonymous  # noqa: E402

from deepclust.models.subhead import SubHead  # noqa: E402
from deepclust.world import World, join, leave  # noqa: E402

WATCHED, TIMED = 3, 5  # steps
MB, GB = 1e6, 1e9


@dataclass(frozen=True)
class Size:
    """S super-classes of k_s sub-clusters, D features, G rows a step, W ranks, e bytes a number."""

    S: int
    k_s: int
    D: int
    G: int
    W: int = 1
    e: int = 4

    @property
    def own(self) -> int:
        """Sub-clusters of every super-class that a rank has, at most."""
        return math.ceil(self.k_s / self.W)

    @property
    def held(self) -> int:
        """Bytes of weights, gradients and momentum on a rank."""
        return 12 * self.S * self.own * (self.D + 1)

    @property
    def kept(self) -> int:
        """Bytes from forward to backward."""
        return self.e * self.G * (self.D + self.own)

    @property
    def working(self) -> int:
        """Bytes while it works, at most."""
        return 12 * self.G * self.own + 4 * self.G * self.D + 2 * self.e * self.own * self.D

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step: gathered, all-reduced, scattered."""
        gathered, reduced, scattered = self.e * self.D + 16, 2 * 4 + 2 * 8, 4 * self.D
        return (self.W - 1) / self.W * self.G * (gathered + reduced + scattered)

    def peak(self, decay: float) -> int:
        """With weight decay torch's SGD makes a copy of the gradient, in one tensor."""
        return max(self.held + self.kept + self.working, self.held * 4 // 3 if decay else 0)


SCALED = Size(S=16, k_s=4_000, D=1024, G=192)
PAPER = Size(S=16, k_s=80_000, D=4096, G=3072)


@dataclass(frozen=True)
class Case:
    """Who computes the loss, on how many ranks."""

    name: str
    ranks: int = 1
    decay: float = 0.0

    @property
    def size(self) -> Size:
        """What a rank has."""
        return Size(SCALED.S, SCALED.k_s, SCALED.D, SCALED.G, self.ranks)


CASES = [
    Case("packed"), Case("packed", 2), Case("packed", 3), Case("packed, weight decay", 1, 1e-5),
    Case("indexed"),
]  # fmt: skip


def main() -> None:
    """Measure in turn, print the tables, write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of every case")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    machine, runs = processes.machine(), []
    for turn in range(options.rounds):
        for case in CASES[turn % len(CASES) :] + CASES[: turn % len(CASES)]:
            runs.append({**asdict(case), "each": spawned(case)})
    measured, paper = [line(case, runs) for case in CASES], list(for_paper())
    print(f"S={SCALED.S} k_s={SCALED.k_s} D={SCALED.D} G={SCALED.G}, {machine['cpus']} cores, ")
    print(f"load before {machine['load_before']}\n\n{report.markdown(measured)}\n")
    print(f"Formula, S={PAPER.S} k_s={PAPER.k_s} D={PAPER.D} G={PAPER.G}, of a rank\n")
    print(report.markdown(paper))
    if options.json:
        found = {"machine": machine, "load_after": os.getloadavg(), "scaled": asdict(SCALED)}
        found |= {"runs": runs, "table": measured, "paper": paper}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def spawned(case: Case) -> list[dict]:
    """What each rank found, in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(case.ranks, mp_context=spawn) as pool,
    ):
        meeting = Path(folder, "meeting")
        jobs = [pool.submit(one_rank, case, rank, meeting) for rank in range(case.ranks)]
        return [job.result() for job in jobs]


def one_rank(case: Case, rank: int, meeting: Path) -> dict:
    """Bytes and seconds of this rank, and the loss of all rows after the last step."""
    torch.set_num_threads(1)
    torch.ones(256, 256) @ torch.ones(256, 256)
    world = join(rank, case.ranks, meeting, torch.device("cpu"), 60)
    with Peak() as peak:
        steps = trained(case, world)
        for _ in range(WATCHED):
            loss = next(steps)
        ctypes.CDLL(None).malloc_trim(0)  # else free pages of the heap would count
        left = anonymous(os.getpid()) - peak.before
    seconds = []
    for _ in range(TIMED):
        world.barrier()
        began = time.perf_counter()
        loss = next(steps)
        seconds.append(time.perf_counter() - began)
    mean = world.sum(loss).item() / world.size
    world.barrier()
    leave()
    return {"peak": peak.bytes, "left": left, "seconds": seconds, "loss": mean}


def trained(case: Case, world: World) -> Iterator[torch.Tensor]:
    """Step after step on one batch, with the features' gradient; yields this rank's loss."""
    size, random = case.size, torch.Generator().manual_seed(0)
    rows = torch.randn(size.G, size.D, generator=random).relu_()
    classes = (torch.randint(n, (size.G,), generator=random) for n in (size.S, size.k_s))
    features, s, z = (part.tensor_split(world.size)[world.rank] for part in (rows, *classes))
    features.requires_grad_()
    head = SubHead(size.D, size.S, size.k_s, world, seed=0)
    optimizer = torch.optim.SGD(head.parameters(), 0.05, 0.9, weight_decay=case.decay)
    while True:
        optimizer.zero_grad(set_to_none=True)
        features.grad = None
        loss = indexed(head, features, s, z) if case.name == "indexed" else head(features, s, z)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def indexed(
    head: SubHead, features: torch.Tensor, s: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """The same loss on one rank, as one would write it."""
    losses = [
        F.cross_entropy(
            F.linear(features[s == i], head.weight[i], head.bias[i]), z[s == i], reduction="sum"
        )
        for i in s.unique().tolist()
    ]
    return torch.stack(losses).sum() / len(s)


def line(case: Case, runs: list[dict]) -> dict:
    """Memory of the rank that had most, seconds of the rank that was last; medians of rounds."""
    mine = [run["each"] for run in runs if Case(run["name"], run["ranks"], run["decay"]) == case]
    left, peak = (median(max(r[name] for r in each) for each in mine) for name in ("left", "peak"))
    steps = [median(map(max, zip(*(r["seconds"] for r in each), strict=True))) for each in mine]
    ours, size = case.name != "indexed", case.size
    return {
        "sub-head": case.name, "ranks": case.ranks,
        "left, MB": f"{left / MB:.0f}", "formula": f"{size.held / MB:.0f}" if ours else "",
        "peak, MB": f"{peak / MB:.0f}",
        "formula, at most": f"{size.peak(case.decay) / MB:.0f}" if ours else "",
        "step, s": report.spread(steps), "loss": f"{mine[0][0]['loss']:.6f}",
    }  # fmt: skip


def for_paper() -> Iterator[dict]:
    """The formula for the paper's size."""
    for ranks in (64, 8, 1):
        for product, e in {"fp32": 4, "bf16": 2}.items():
            size = Size(PAPER.S, PAPER.k_s, PAPER.D, PAPER.G, ranks, e)
            yield {
                "ranks": ranks, "product": product,
                "weights, gradients, momentum, GB": f"{size.held / GB:.2f}",
                "and SGD's copy (weight decay), GB": f"{size.held / 3 / GB:.2f}",
                "kept forward to backward, GB": f"{size.kept / GB:.3f}",
                "while it works, at most, GB": f"{size.working / GB:.3f}",
                "sent in a step, MB": f"{size.sent / MB:.1f}",
            }  # fmt: skip


if __name__ == "__main__":
    main()
