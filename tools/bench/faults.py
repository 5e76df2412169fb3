#!/usr/bin/env python3
"""Lost processes of a run on every executor: noticed when, ended how, and with which result.

    python tools/bench/faults.py [--where local ray slurm-ray slurm-srun] [--out FILE]

Two ranks, each with a reader process, and the cluster worker. In the second round's training one
of them is killed, or stopped with SIGSTOP. Seconds are from the signal to the event `fault`; those
of SIGSTOP include `train.hang`, 6 s here, and half as much again where the process that was
stopped is a reader, whose rank still answers. Bits are compared with an undisturbed local run.
"""

from __future__ import annotations

import argparse
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

from cluster_jobs import job_file  # noqa: E402
from deepclust import pretrain  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray.nodes import Nodes, begin  # noqa: E402

SETTINGS = ("train.ranks=2", "train.epochs=8", "train.hang=6", "data.workers=1")
SIGNALS = {"SIGSTOP": signal.SIGSTOP, "kill": signal.SIGKILL}
VICTIMS = ("rank 1", "cluster worker", "reader of rank 1")
WHERE = ("local", "ray", "slurm-ray", "slurm-srun")
PATIENCE_S = 300.0
Begin = Callable[[Path], object]


def main() -> None:
    """Run all, print the table, write the facts."""
    args = arguments()
    shutil.rmtree(args.work, ignore_errors=True)
    recipe = tiny.tiny_recipe(tiny.tiny_shards(args.work / "shards"), *SETTINGS)
    recipe.save(args.work / "recipe.yaml")
    pretrain(recipe, args.work / "undisturbed")
    records: list[dict[str, Any]] = []
    for where in args.where:
        with executor(where, args.work) as start:
            for victim in VICTIMS:
                for sent in SIGNALS:
                    records.append(one(start, args.work, where, victim, sent))
                    print(json.dumps(records[-1]), flush=True)
    args.out.write_text(json.dumps(records, indent=1))
    print(table(records))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--where", nargs="+", choices=WHERE, default=WHERE)
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


def one(start: Begin, work: Path, where: str, victim: str, sent: str) -> dict[str, Any]:
    """Make one run, strike once, and return what became of it."""
    run = work / f"{where}-{victim}-{sent}".replace(" ", "-")
    process = start(run)
    wait(lambda: killing.training(run))
    who = "rank 1" if "reader" in victim else victim
    placed = [e for e in Run(run).events() if e["event"] == "placed"][-1]["members"]
    (pid,) = [member["pid"] for member in placed if member["who"] == who]
    for struck in killing.readers(pid) if "reader" in victim else [pid]:
        os.kill(struck, SIGNALS[sent])
    moment = time.time()
    wait(lambda: has_ended(run))
    if hasattr(process, "wait"):
        process.wait()
    return {"where": where, "victim": victim, "signal": sent, **judged(run, work, moment)}


def has_ended(run: Path) -> bool:
    """Return whether the run has ended, and does not wait to begin again."""
    last = Run(run).events()[-1]
    return last["event"] == "finished" or (
        last["event"] == "stopped" and last["kind"] != "RequeueWanted"
    )


def wait(moment: Callable[[], Any]) -> None:
    """Wait for a moment of the run."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        if time.monotonic() > deadline:
            raise RuntimeError("the moment never came")
        time.sleep(0.001)


def judged(run: Path, work: Path, moment: float) -> dict[str, Any]:
    """Return seconds to notice, who was named for what, how it ended, and if bits are equal."""
    events = Run(run).events()
    fault = next((e for e in events if e["event"] == "fault"), None)
    try:
        tiny.assert_same_run(run, work / "undisturbed")
        same = True
    except AssertionError:
        same = False
    starts = len(list((run / "slurm").glob(f"{job_file.read(run).get('job')}-[0-9]*")))
    again = "restarted" if starts < 2 else "queued again"
    finished = events[-1]["event"] == "finished"
    return {
        "noticed_s": fault and fault["time"] - moment, "named": fault and fault["who"],
        "cause": fault and fault["cause"], "ended": again if finished else "ended",
        "attempts": sum(e["event"] == "started" for e in events), "same": same,
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown: one line an executor and fault."""
    heads = ("executor", "fault", "noticed, s", "named", "cause", "then", "attempts", "same bits")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in records:
        seconds = "never" if r["noticed_s"] is None else f"{r['noticed_s']:.1f}"
        cells = (r["where"], f"{r['signal']} of {r['victim']}", seconds, r["named"], r["cause"],
                 r["ended"], r["attempts"], "yes" if r["same"] else "no")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
