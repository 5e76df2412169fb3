#!/usr/bin/env python3
"""Faults at random instants of runs on Ray: what survives, what is lost, how long it takes.

    python tools/bench/ray/faults.py [--times 5] [--kinds trainer node ...] [--out FILE]

A real Ray of four nodes of one CPU on this machine, two trainers and the cluster worker, one node
to spare. Each fault strikes once in a run of some hundred steps, at an instant drawn from its
duration (an extraction worker: while units of a drawn round are made). A run survives when it ends
by itself; rows are lost or doubled when any round's assignments differ from those of the local run
that nobody disturbed, or a finished stage was made twice; work lost is the most steps that were
trained again. Seconds: from the fault to the controller's `fault` event, and to the first event of
the ranks of the next attempt. With SIGSTOP the first includes `ray.hang`, 6 s here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from deepclust import pretrain  # noqa: E402
from deepclust.run.directory import Run, is_done  # noqa: E402
from deepclust.world import generator  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray.nodes import Nodes, begin, events, placed_at  # noqa: E402

INTERVAL = 40  # steps between checkpoints
SETTINGS = (
    "train.ranks=2", "train.epochs=4", f"train.checkpoint={INTERVAL} steps", "train.log=5",
    "data.extract_batch=16", "ray.hang=6",
)  # fmt: skip
RANKS = ("rank 0", "rank 1")
KINDS = ("trainer", "cluster worker", "extraction", "node", "hang", "submitter")
PATIENCE_S = 180.0


def main() -> None:
    """Run all, print the table, write the facts."""
    args = arguments()
    shutil.rmtree(args.work, ignore_errors=True)
    shards = tiny.tiny_shards(args.work / "shards", n=2400)
    recipe = tiny.tiny_recipe(shards, *SETTINGS)
    recipe.save(args.work / "recipe.yaml")
    pretrain(recipe, args.work / "whole")
    nodes = Nodes(4, dashboard=True)
    try:
        length = undisturbed(nodes, recipe, args.work / "calm")
        records = [
            one(nodes, recipe, args.work, kind, number, length)
            for kind in args.kinds
            for number in range(args.times)
        ]
    finally:
        nodes.close()
    args.out.write_text(json.dumps({"seconds undisturbed": length, "faults": records}, indent=1))
    print(table(records))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-ray-faults"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-ray-faults.json"))
    return parser.parse_args()


def undisturbed(nodes: Nodes, recipe: Any, run: Path) -> float:
    """Seconds from the first round's first unit to the end, of a run that nobody disturbs."""
    process = begin(nodes, recipe, run)
    process.communicate(timeout=PATIENCE_S)
    first = next(e for e in Run(run).events() if e["event"] == "unit")
    return float(events(run, "finished")[0]["time"] - first["time"])


def one(
    nodes: Nodes, recipe: Any, work: Path, kind: str, number: int, length: float
) -> dict[str, Any]:
    """One run, one fault, and what became of it."""
    run, draw = work / f"{kind.replace(' ', '-')}-{number}", generator(number, "bench", kind)
    process: Any = begin(nodes, recipe, run) if kind != "submitter" else submitter(nodes, work, run)
    wait(process, lambda: (run / "events.jsonl").exists() and events(run, "unit"))
    strike_round = int(draw.integers(1, 4))
    if kind == "extraction":
        wait(process, lambda: extracting(run, strike_round))
    else:
        time.sleep(draw.uniform(0.0, 0.9 * length))
    struck = strike(nodes, run, kind, draw, process)
    ended = ending(run, process)
    record = {"kind": kind, "number": number, **struck, **judged(run, work / "whole", struck)}
    print(json.dumps({**record, "ended": ended}), flush=True)
    return record


def submitter(nodes: Nodes, work: Path, run: Path) -> subprocess.Popen[bytes]:
    """`deepclust submit --wait`, which follows its Ray job."""
    submit = ["submit", work / "recipe.yaml", "--on", "ray", "--address", nodes.address]
    return killing.start(*submit, "--run", run, "--wait")


def extracting(run: Path, number: int) -> bool:
    """Some units of the round are there, not all."""
    raw = run / "rounds" / f"{number:04d}" / "raw"
    return any(raw.glob("unit-*.safetensors")) and not is_done(raw)


def strike(nodes: Nodes, run: Path, kind: str, draw: Any, process: Any) -> dict[str, Any]:
    """The fault itself; where the run was, and when."""
    who = "cluster worker" if kind == "cluster worker" else RANKS[int(draw.integers(2))]
    names = [e["event"] for e in Run(run).events()]
    facts = {"who": who, "after": names[-1], "time": time.time()}
    if kind == "submitter":
        process.kill()
        process.wait()
        return {**facts, "who": "submit --wait"}
    place = placed_at(run, who)
    if kind == "node":
        nodes.remove(place["node"])
        nodes.add()  # the one to spare for the next run
    else:
        os.kill(place["pid"], signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
    return facts


def ending(run: Path, process: Any) -> str:
    """Wait until the run has ended, whichever process controls it."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(e["event"] in ("finished", "stopped") for e in Run(run).events()):
        if time.monotonic() > deadline:
            return "never"
        time.sleep(0.1)
    if process.stdout is not None:
        process.communicate(timeout=PATIENCE_S)
    return str(Run(run).events()[-1]["event"])


def wait(process: Any, moment: Callable[[], Any]) -> None:
    """Until the moment comes."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the run ended, or hung, before its fault")
        time.sleep(0.001)


def judged(run: Path, whole: Path, struck: dict[str, Any]) -> dict[str, Any]:
    """Survived, rows lost or doubled, steps done again, seconds to notice and to recover."""
    done = bool(events(run, "finished"))
    pairs = zip(tiny.assignments(run), tiny.assignments(whole), strict=False)
    same = done and all(np.array_equal(a, b) for a, b in pairs)
    faults = events(run, "fault")
    later = [e for e in Run(run).events() if e["attempt"] > 1 and e["event"] in RANKS_SAY]
    noticed = faults[0]["time"] - struck["time"] if faults else None
    return {
        "survived": done, "rows right": same and not killing.stages_done_twice(run),
        "same weights": done and same_weights(run, whole), "redone": killing.redone_steps(run),
        "attempts": len(events(run, "started")),
        "noticed_s": noticed, "recovered_s": later[0]["time"] - struck["time"] if later else None,
        "cause": faults[0]["cause"] if faults else "",
    }  # fmt: skip


RANKS_SAY = ("restored", "unit", "training", "extracted", "features", "checkpoint")


def same_weights(run: Path, whole: Path) -> bool:
    """Whether the final weights and optimizers are those of the undisturbed local run."""
    a, b = tiny.final_weights(run), tiny.final_weights(whole)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def table(records: list[dict[str, Any]]) -> str:
    """A line a kind of fault."""
    lines = [
        "| fault | survived | rows lost or doubled | same weights | steps redone, most "
        "| noticed, s | recovered, s (least, median, most) |", "|---" * 7 + "|",
    ]  # fmt: skip
    for kind in dict.fromkeys(r["kind"] for r in records):
        rows = [r for r in records if r["kind"] == kind]
        took = sorted(r["recovered_s"] for r in rows if r["recovered_s"] is not None)
        seen = [r["noticed_s"] for r in rows if r["noticed_s"] is not None]
        spread = f"{took[0]:.1f}, {statistics.median(took):.1f}, {took[-1]:.1f}" if took else "-"
        cells = [
            kind, f"{sum(r['survived'] for r in rows)} of {len(rows)}",
            sum(not r["rows right"] for r in rows), sum(r["same weights"] for r in rows),
            max(r["redone"] for r in rows), f"{statistics.median(seen):.1f}" if seen else "-",
            spread,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
