#!/usr/bin/env python3
"""kill -9 of every method at random instants, local and on Ray, resumed on other numbers of ranks.

    python tools/bench/method_kills.py [--on local ray] [--times 3] [--methods swav dino] [--out F]

A run of each method on two ranks, 48 steps, is left alone. Others are killed at a drawn step, and a
drawn time later: the controller, or a rank. Each is resumed, if it does not go on by itself, on 2,
1 or 3 ranks in turn. On two ranks all bits must be those of the first run. On another number each
rank's batch norm sees other rows (a CPU has no SyncBatchNorm), so the table has the steps, and the
relative difference of the first loss after the resume, where weights are still equal.
Finished records are kept in --out: the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust import Recipe  # noqa: E402
from deepclust.files import read_jsonl  # noqa: E402
from deepclust.methods import METHODS  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.world import generator  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tests.cluster_jobs.ray import nodes as on_nodes  # noqa: E402
from tests.methods.cases import CASES  # noqa: E402

STEPS = 48
SETTINGS = ("train.epochs=4", "train.log=1", "train.checkpoint=7 steps", "train.ranks=2")
RESUMED_ON = (2, 1, 3)
VICTIMS = ("controller", "rank 0", "rank 1")
LONGEST_DELAY_S = 0.3


def main() -> None:
    """Run what is missing, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-method-kills.jsonl"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run_all(args, Path(name))
    print(table(read_jsonl(args.out)))


def run_all(args: argparse.Namespace, folder: Path) -> None:
    """Go through the methods, each where it is asked for."""
    tiny.tiny_shards(folder / "shards")
    cluster = on_nodes.Nodes(3) if "ray" in args.on else None
    try:
        for name in args.methods:
            done = [(r["method"], r["on"], r["number"]) for r in read_jsonl(args.out)]
            todo = [(on, n) for on in args.on for n in range(args.times)]
            todo = [one for one in todo if (name, *one) not in done]
            if todo:
                leave_alone(folder, name)
            for on, number in todo:
                record = one_kill(folder, name, cluster if on == "ray" else None, number)
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)
    finally:
        if cluster is not None:
            cluster.close()


def recipe(folder: Path, name: str) -> Recipe:
    """The method's small case."""
    return tiny.tiny_recipe(folder / "shards", f"method.name={name}", *CASES[name], *SETTINGS)


def leave_alone(folder: Path, name: str) -> None:
    """Run a method undisturbed."""
    recipe(folder, name).save(folder / f"{name}.yaml")
    shutil.rmtree(folder / "whole", ignore_errors=True)
    tiny.deepclust("pretrain", folder / f"{name}.yaml", "--run", folder / "whole")


def one_kill(folder: Path, name: str, cluster: Any, number: int) -> dict[str, Any]:
    """Kill a run once, let it end, and compare it with the one that was left alone."""
    run, on = folder / "run", "ray" if cluster else "local"
    shutil.rmtree(run, ignore_errors=True)
    rng = generator(0, "method kills", name, on, number)
    step, delay = int(rng.integers(1, STEPS)), rng.uniform(0, LONGEST_DELAY_S)
    ranks = RESUMED_ON[number % len(RESUMED_ON)]
    victim = "controller" if ranks != 2 else str(rng.choice(VICTIMS))
    if cluster is None:
        killed_here(folder, name, run, step, delay, victim)
    else:
        killed_on_ray(recipe(folder, name), run, cluster, step, victim)
    if victim == "controller":
        tiny.deepclust("resume", run, f"train.ranks={ranks}")
    return {
        "method": name, "on": on, "number": number, "victim": victim, "step": step,
        "ranks": ranks, "steps_redone": killing.redone_steps(run),
        "attempts": sum(e["event"] == "started" for e in Run(run).events()),
        **compared(run, folder / "whole"),
    }  # fmt: skip


def reached(run: Path, step: int) -> bool:
    """Whether the run has trained so many steps."""
    file = run / "metrics.jsonl"
    return file.exists() and any(r["step"] >= step for r in Run(run).metrics("train"))


def killed_here(folder: Path, name: str, run: Path, step: int, delay: float, victim: str) -> None:
    """Kill a process of a run on this machine, and wait until nothing of the run is left."""
    process = killing.start("pretrain", folder / f"{name}.yaml", "--run", run)
    killing.kill_when(process, run, lambda path: reached(path, step), delay, victim)


def killed_on_ray(given: Recipe, run: Path, cluster: Any, step: int, victim: str) -> None:
    """Kill the controller of a run on Ray, or one of its ranks, and wait for its end."""
    process = on_nodes.begin(cluster, given, run)
    on_nodes.until(process, lambda: reached(run, step))
    if victim != "controller":
        on_nodes.send(run, victim, signal.SIGKILL)
        on_nodes.end(process)
        return
    members = [member["pid"] for member in on_nodes.events(run, "placed")[-1]["members"]]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killing.wait_until_gone(members, patience=60.0)


def compared(run: Path, whole: Path) -> dict[str, Any]:
    """Whether all bits are equal, and how far the first loss of the last attempt is away."""
    try:
        tiny.assert_same_run(run, whole)
        same = True
    except AssertionError:
        same = False
    mine, expected = (Run(one).metrics("train") for one in (run, whole))
    last = next(r for r in mine if r["attempt"] == mine[-1]["attempt"])
    (there,) = [r["loss"] for r in expected if r["step"] == last["step"]]
    equal_steps = [r["step"] for r in mine] == [r["step"] for r in expected]
    away = abs(last["loss"] / there - 1)
    return {"same_bits": same, "same_steps": equal_steps, "loss_away": away}


def table(records: list[dict[str, Any]]) -> str:
    """By method and place."""
    heads = ("method", "on", "kills", "same bits, 2 ranks", "1 and 3 ranks: same steps",
             "first loss, relative", "most steps redone")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in sorted({(r["method"], r["on"]) for r in records}):
        mine = [r for r in records if (r["method"], r["on"]) == key]
        two, other = ([r for r in mine if (r["ranks"] == 2) is same] for same in (True, False))
        cells = (
            *key, len(mine), f"{sum(r['same_bits'] for r in two)} of {len(two)}",
            f"{sum(r['same_steps'] for r in other)} of {len(other)}",
            f"{max((r['loss_away'] for r in other), default=0):.1e}",
            max(r["steps_redone"] for r in mine),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
