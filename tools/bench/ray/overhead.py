#!/usr/bin/env python3
"""What does Ray cost? The same job on two local ranks and on Ray, pair by pair.

    python tools/bench/ray/overhead.py [--pairs 5] [--steps 150] [--nodes 3] [a.b=c ...]

Recipe demo-fashion on Fashion-MNIST, two trainers and the cluster worker. On Ray each is on a node
(a raylet) of its own, all on this machine, whose cores their daemons share; with --nodes 0 it is
the Ray of one machine that a run without an address starts for itself. In the steady state, from
step FIRST on for so many steps: the wall time (paired ratio local / Ray with its bootstrap interval
of 95 %; above 1 Ray is faster) and the CPU time of a step, of all processes, and of those that are
no rank and no worker ("beside": launcher, controller, Ray's daemons). Start-up: from the command to
the first unit of extraction; and of it, until the ranks are placed.

Also compared: the assignments of round 0, the epoch's global batches, the final weights; and where
the cluster worker's time goes, and how long the ranks wait for it, without and with overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from deepclust import EpochPlan, Recipe  # noqa: E402
from deepclust.launch.start import prepare_run  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.world import generator  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray.nodes import Nodes, controller, events  # noqa: E402

FIRST = 40  # the steady state begins here
SETTINGS = ("train.ranks=2", "train.epochs=1", "train.log=10", "data.workers=0", "train.threads=1")
TICK = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 400.0


def main() -> None:
    """Run pairs, print the tables, write the facts."""
    args = arguments()
    shutil.rmtree(args.work, ignore_errors=True)
    os.environ.update({"RAY_worker_niceness": "0"})  # 15 by default: others would come first
    nodes = Nodes(args.nodes) if args.nodes else None
    facts: dict[str, Any] = {"pairs": [], "load": os.getloadavg()}
    try:
        for number in range(args.pairs):
            facts["pairs"].append(
                {where: one(args, nodes, where, number) for where in order(number)}
            )
            args.out.write_text(json.dumps(facts, indent=1))
        facts["same"] = compared(args.work / "local-0", args.work / "ray-0")
        if args.epochs:
            facts["cluster worker"] = {
                mode: waits(args, nodes, mode, f"cluster.overlap={value}")
                for mode, value in (("off", "false"), ("on", "true"))
            }
    finally:
        if nodes:
            nodes.close()
    args.out.write_text(json.dumps(facts, indent=1))
    print(table(facts["pairs"]), facts["same"], sep="\n\n")
    if args.epochs:
        print(worker_table(facts["cluster worker"]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the cluster worker; 0: none")
    parser.add_argument("--shards", type=Path, default=Path("/tmp/deepclust-quality/fashion/train"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-ray-overhead"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-ray-overhead.json"))
    parser.add_argument("overrides", nargs="*", help="recipe values, for both")
    args = parser.parse_args()
    if 0 < args.epochs < 3:
        parser.error("--epochs 3 or more: with overlap the last round begins no other one")
    return args


def order(number: int) -> tuple[str, str]:
    """Who goes first alternates."""
    return ("local", "ray") if number % 2 == 0 else ("ray", "local")


def recipe(args: argparse.Namespace, *more: str) -> Recipe:
    """The recipe of both."""
    return Recipe.load(
        "demo-fashion", f"data.shards={args.shards}", *SETTINGS, *args.overrides, *more
    )


def one(args: argparse.Namespace, nodes: Nodes | None, where: str, number: int) -> dict[str, Any]:
    """One run: seconds and CPU seconds of a step, seconds of the start."""
    run = args.work / f"{where}-{number}"
    prepare_run(recipe(args), run)
    began = time.time()
    process: Any = killing.start("resume", run) if where == "local" else controller(nodes, run)
    raylets = [pid for pid in killing.family(os.getpid()) if pid != os.getpid()]
    roots = [process.pid] if where == "local" or nodes is None else raylets
    (first, cpu_first), (last, cpu_last) = (
        reached(run, process, step, roots) for step in (FIRST, FIRST + args.steps)
    )
    process.wait(timeout=PATIENCE_S)
    steps = last["step"] - first["step"]
    unit = events(run, "unit")[0]
    used = {name: (cpu_last[name] - cpu_first[name]) / steps for name in cpu_last}
    placed = events(run, "placed" if where == "ray" else "started")[0]
    facts = {
        "step_s": (last["time"] - first["time"]) / steps, "cpu_s": sum(used.values()),
        "beside_s": used["beside"], "start_s": unit["time"] - began,
        "placed_s": placed["time"] - began,
    }  # fmt: skip
    print(where, number, json.dumps(facts), flush=True)
    return facts


def reached(
    run: Path, process: Any, step: int, roots: list[int]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The first record at or after a step, and the CPU seconds that were used by then."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        passed = [r for r in Run(run).metrics("train") if r["step"] >= step]
        if passed:
            return passed[0], cpu(roots)
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{run} ended before step {step}")
        time.sleep(0.01)


def cpu(roots: list[int]) -> dict[str, float]:
    """CPU seconds of these processes and their descendants: of the worker group, and of others."""
    used = {"group": 0.0, "beside": 0.0}
    for pid in {pid for root in roots for pid in killing.family(root)}:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        used["group" if killing.role(pid, 0) else "beside"] += sum(map(int, fields[11:13])) / TICK
    return used


def compared(local: Path, ray: Path) -> str:
    """Are rounds, batches and weights the same?"""
    a, b = tiny.assignments(local)[0], tiny.assignments(ray)[0]
    plans = [EpochPlan.build(x[0], seed=0, epoch=0, global_batch=256).ids for x in (a, b)]
    mine, theirs = tiny.final_weights(local), tiny.final_weights(ray)
    numbers = [n for n in mine if mine[n].dtype.kind == "f"]
    most = max(float(np.abs(mine[n] - theirs[n]).max(initial=0)) for n in numbers)
    return (
        f"Round 0: {int((a != b).sum())} of {a.size} assignments differ; the global batches of the "
        f"epoch are {'equal' if np.array_equal(*plans) else 'different'}; final weights and "
        f"momentum differ by {most:g} at most."
    )


def waits(args: argparse.Namespace, nodes: Nodes | None, mode: str, setting: str) -> dict[str, Any]:
    """Where the cluster worker's time goes, and how long the ranks wait, a round."""
    run = args.work / f"overlap-{mode}"
    prepare_run(recipe(args, f"train.epochs={args.epochs}", "cluster.k=1000", setting), run)
    process: Any = controller(nodes, run)
    try:
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.terminate()  # with the Ray that it has started
        process.wait()
    done = [e for e in events(run, "published") if e["round"] > 0]
    waited = [
        e["seconds"]
        for e in events(run, "waited")
        if e["round"] > 0 and e["stage"] == "assignments"
    ]
    parts = ("prepare", "read", "cluster", "write")
    whitened = [e["seconds"] for e in events(run, "whitening") if e["round"] > 0]
    return {
        **{part: statistics.mean(e[part] for e in done) for part in parts},
        "whiten": statistics.mean(whitened), "ranks waited": sum(waited) / len(done),
    }  # fmt: skip


def table(pairs: list[dict[str, dict[str, float]]]) -> str:
    """Medians, and the paired ratio with its interval."""
    lines = [
        "| | ms a step | CPU ms a step | of it beside | start, s | placed, s |",
        "|---" * 6 + "|",
    ]
    for where in ("local", "ray"):
        step, used, beside, start, placed = (
            statistics.median(pair[where][name] for pair in pairs)
            for name in ("step_s", "cpu_s", "beside_s", "start_s", "placed_s")
        )
        milliseconds = " | ".join(f"{1e3 * value:.1f}" for value in (step, used, beside))
        lines.append(f"| {where} | {milliseconds} | {start:.1f} | {placed:.1f} |")
    ratios = np.array([pair["local"]["step_s"] / pair["ray"]["step_s"] for pair in pairs])
    draws = generator(0, "bench", "overhead").choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    lines.append(
        f"\nPaired ratio local / Ray of the time of a step: {np.median(ratios):.3f} "
        f"[{low:.3f}, {high:.3f}], {len(ratios)} pairs."
    )
    return "\n".join(lines)


def worker_table(facts: dict[str, dict[str, float]]) -> str:
    """Seconds a round."""
    names = list(next(iter(facts.values())))
    lines = ["| overlap | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for mode, values in facts.items():
        lines.append(f"| {mode} | " + " | ".join(f"{values[n]:.3f}" for n in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
