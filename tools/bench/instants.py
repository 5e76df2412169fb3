#!/usr/bin/env python3
"""kill -9 at ten instants of the threads that commit checkpoints and chunks of an extraction.

    python tools/bench/instants.py [--times 1] [--out FILE]

Each instant is just before or after a call in such a thread, while the main thread goes on. Then
the run is resumed, and compared with one that nobody disturbed. Exit code 0 only if every kill
struck, and every run ended with the same weights, optimizers and assignments, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import instants, killing, tiny  # noqa: E402 - the harness of the tests
from tests.forks import in_fork  # noqa: E402


def main() -> int:
    """Strike every instant, print a table, write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-instants.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = tiny.tiny_shards(folder / "shards", n=1200)
        tiny.tiny_recipe(shards, *instants.SETTINGS).save(folder / "recipe.yaml")
        in_fork(instants.leave_alone, folder / "recipe.yaml", folder / "whole")
        records = [one(folder, name) for name in instants.INSTANTS for _ in range(args.times)]
    args.out.write_text(json.dumps(records, indent=1))
    return 0 if all(record["struck"] and record["same"] for record in records) else 1


def one(folder: Path, name: str) -> dict[str, Any]:
    """Kill one run at an instant, resume it, and compare."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe = folder / "recipe.yaml"
    code = in_fork(instants.kill_and_resume, recipe, run, instants.INSTANTS[name])
    try:
        tiny.assert_same_run(run, folder / "whole")
        same = True
    except AssertionError:
        same = False
    struck, twice = code == -signal.SIGKILL, len(killing.stages_done_twice(run))
    redone = killing.redone_steps(run)
    print(f"{name:32} struck {struck}, same bits {same}, stages done twice {twice}, "
          f"steps redone {redone}", flush=True)  # fmt: skip
    return {"instant": name, "struck": struck, "same": same, "twice": twice, "redone": redone}


if __name__ == "__main__":
    sys.exit(main())
