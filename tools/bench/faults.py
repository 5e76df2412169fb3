#!/usr/bin/env python3
"""Lost processes of a run on every executor: noticed when, ended how, and with which result.

    python tools/bench/faults.py [--where local ray ...] [--victims reader ...] [--hang 6]

One run on every executor: two ranks, each with a reader process, and the cluster worker. In every
attempt, after its first checkpoint, one of them is killed, or stopped with SIGSTOP. Seconds are
from the signal to the event `fault`. Those of SIGSTOP include `train.hang`, 6 s here, and half as
much again where a reader is stopped, whose rank still answers. The result of all the attempts is
compared with an undisturbed local run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust import pretrain  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray.nodes import Nodes, begin  # noqa: E402

SETTINGS = ("train.ranks=2", "train.epochs=40", "train.restarts=10")
SIGNALS = {"SIGSTOP": signal.SIGSTOP, "kill": signal.SIGKILL}
VICTIMS = ("rank 1", "cluster worker", "reader")  # the readers of rank 1
WHERE = ("local", "ray", "slurm-ray", "slurm-srun")
ENDS = ("started", "stopped")
PATIENCE_S = 600.0
Begin = Callable[[Path], object]


def main() -> None:
    """Run all, print the table, write the facts."""
    args = arguments()
    shutil.rmtree(args.work, ignore_errors=True)
    workers = f"data.workers={int('reader' in args.victims)}"
    recipe = tiny.tiny_recipe(tiny.tiny_shards(args.work / "shards"), *SETTINGS, workers)
    recipe.replace(f"train.hang={args.hang}").save(args.work / "recipe.yaml")
    pretrain(recipe, args.work / "undisturbed")
    records: list[dict[str, Any]] = []
    for where in args.where:
        with executor(where, args.work) as start:
            records += struck(start, args.work, where, args.victims)
    args.out.write_text(json.dumps(records, indent=1))
    print(table(records))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--where", nargs="+", choices=WHERE, default=WHERE)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--hang", type=float, default=6.0, help="more on a machine that is busy")
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-faults"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-faults.json"))
    return parser.parse_args()


@contextmanager
def executor(where: str, work: Path) -> Iterator[Begin]:
    """Have what the executor needs; yields how to start a run on it."""
    file = work / "recipe.yaml"
    if where == "local":
        yield lambda run: killing.start("pretrain", file, "--run", run)
    elif where == "ray":
        nodes = Nodes(3)
        try:
            yield lambda run: begin(nodes, tiny.Recipe.load(file), run)
        finally:
            nodes.close()
    else:
        from tests.cluster_jobs.slurm.slurm_here import running

        launcher = f"slurm.launcher={where.removeprefix('slurm-')}"
        words = ["submit", file, "--on", "slurm", "slurm.nodes=2", "slurm.start=120", launcher]
        with running():
            yield lambda run: tiny.deepclust(*words, "--run", run)


def struck(start: Begin, work: Path, where: str, victims: list[str]) -> list[dict[str, Any]]:
    """Make one run, strike once in each of its attempts, and return what became of each."""
    run, records = work / where, []
    process = start(run)
    for attempt, (victim, sent) in enumerate(itertools.product(victims, SIGNALS), 1):
        moment = strike(run, attempt, victim, SIGNALS[sent])
        fault, then = await_event(run, moment, "fault"), await_event(run, moment, *ENDS)
        records.append({
            "where": where, "fault": f"{sent} of {victim}", "noticed_s": fault["time"] - moment,
            "named": fault["who"], "cause": fault["cause"],
            "then": "restarted" if then["event"] == "started" else "ended",
        })  # fmt: skip
        print(json.dumps(records[-1]), flush=True)
    wait(lambda: events(run, "finished") or events(run, "stopped"))
    if hasattr(process, "wait"):
        process.wait()
    same = is_same(run, work / "undisturbed")
    return [{**record, "same": same} for record in records]


def strike(run: Path, attempt: int, victim: str, number: int) -> float:
    """Send the signal when the attempt has trained and saved; returns the moment."""
    trained = {"training", "checkpoint"}
    wait(lambda: trained <= {e["event"] for e in Run(run).events() if e["attempt"] == attempt})
    wait(lambda: any(e["step"] and e["attempt"] == attempt for e in events(run, "checkpoint")))
    who = "rank 1" if victim == "reader" else victim
    places = events(run, "placed")[-1]["members"]
    (pid,) = [place["pid"] for place in places if place["who"] == who]
    for one in wait(lambda: killing.readers(pid)) if victim == "reader" else [pid]:
        os.kill(one, number)
    return time.time()


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the events of that name."""
    return [event for event in Run(run).events() if event["event"] == name]


def await_event(run: Path, moment: float, *names: str) -> dict[str, Any]:
    """Wait for the first event of these names after a moment."""
    return dict(wait(lambda: [e for n in names for e in events(run, n) if e["time"] > moment])[0])


def wait(moment: Callable[[], Any]) -> Any:
    """Wait for a moment of the run, and return what it is known by."""
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := moment()):
        if time.monotonic() > deadline:
            raise RuntimeError("the moment never came")
        time.sleep(0.01)
    return seen


def is_same(run: Path, undisturbed: Path) -> bool:
    """Return whether a run is the undisturbed one, bit for bit."""
    try:
        tiny.assert_same_run(run, undisturbed)
    except AssertionError:
        return False
    return True


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown: one line an executor and fault."""
    heads = ("executor", "fault", "noticed, s", "named", "cause", "then", "same bits")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in records:
        cells = (r["where"], r["fault"], f"{r['noticed_s']:.1f}", r["named"], r["cause"], r["then"],
                 "yes" if r["same"] else "no")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
