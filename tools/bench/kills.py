#!/usr/bin/env python3
"""kill -9 at random instants of every kind of moment: does every run resume to the same bits?

    python tools/bench/kills.py [--times 4] [--out FILE]

Half of the kills are with 2 ranks, and there the victim is drawn: the controller, a rank, or the
cluster worker. After each, `deepclust resume`, then: final weights, optimizers and assignments
equal to the undisturbed run's, no finished stage done twice, and the steps redone at most one
checkpoint interval. A kill counts if the moment still lasted as it struck; else it is tried again,
up to 20 times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust.world import generator  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests

INTERVAL = 10  # steps between checkpoints
LONGEST_DELAY_S = {
    "extraction": 0.3, "whitening": 0.01, "k-means": 0.02, "between centroids and assignments": 0,
    "mid-epoch": 0.5, "checkpoint write": 0,
}  # fmt: skip
VICTIMS = {1: ["controller"], 2: ["controller", "rank 0", "rank 1", "cluster worker"]}  # by ranks
TRIES = 20


def main() -> None:
    """Run all, print a table, write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-kills.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.tiny_shards(folder / "shards", n=1200)
        for ranks in (1, 2):
            tiny.deepclust("pretrain", recipe(folder, ranks), "--run", folder / f"whole-{ranks}")
        records = [
            one(folder, moment, 1 + number % 2, number)
            for moment in killing.MOMENTS
            for number in range(args.times)
        ]
    args.out.write_text(json.dumps(records, indent=1))
    print(table(records))


def recipe(folder: Path, ranks: int) -> Path:
    """20 steps an epoch, 2 epochs, a checkpoint every 10 steps."""
    file = folder / f"{ranks}.yaml"
    settings = (f"train.ranks={ranks}", "train.batch=60", f"train.checkpoint={INTERVAL} steps")
    tiny.tiny_recipe(folder / "shards", *settings).save(file)
    return file


def one(folder: Path, moment: str, ranks: int, number: int) -> dict[str, Any]:
    """Kill one run at one moment (again until it struck inside), resume it, and compare."""
    run, tries, struck = folder / "run", 0, False
    rng = generator(0, "kills", moment, number)
    delay, victim = rng.uniform(0, LONGEST_DELAY_S[moment]), str(rng.choice(VICTIMS[ranks]))
    while not struck and tries < TRIES:
        shutil.rmtree(run, ignore_errors=True)
        process = killing.start("pretrain", recipe(folder, ranks), "--run", run)
        struck = killing.kill_when(process, run, killing.MOMENTS[moment], delay, victim)
        tries, delay = tries + 1, delay / 2
    tiny.deepclust("resume", run)
    record = {
        "moment": moment, "ranks": ranks, "victim": victim, "tries": tries, "struck": struck,
        "same": is_same(run, folder / f"whole-{ranks}"),
        "stages_done_twice": killing.stages_done_twice(run),
        "steps_redone": killing.redone_steps(run),
    }  # fmt: skip
    print(record, flush=True)
    return record


def is_same(run: Path, whole: Path) -> bool:
    """Whether a run is the undisturbed one, bit for bit."""
    try:
        tiny.assert_same_run(run, whole)
    except AssertionError:
        return False
    return True


def table(records: list[dict[str, Any]]) -> str:
    """By moment, of the kills that struck it: equal runs, stages done twice, most steps redone."""
    heads = (
        "moment", "kills", "with 2 ranks", "not the controller", "same bits", "stages done twice",
        "most steps redone",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for moment in killing.MOMENTS:
        mine = [r for r in records if r["moment"] == moment and r["struck"]]
        cells = (
            len(mine), sum(r["ranks"] == 2 for r in mine),
            sum(r["victim"] != "controller" for r in mine), sum(r["same"] for r in mine),
            sum(len(r["stages_done_twice"]) for r in mine),
            max((r["steps_redone"] for r in mine), default=0),
        )  # fmt: skip
        lines.append(f"| {moment} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
