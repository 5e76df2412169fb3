"""Damage every file of a finished and of interrupted runs, and count what the verbs make of it.

    python -m tools.bench.fuzz_runs [--out table.json] [--every 1] [--seed 0]

A file is cut in half, has a bit flipped (twice), NUL bytes at its end, is gone, or is a pipe. Then
`status`, `report`, `assignments`, `export` and `resume` work on the run, in this process. Outcomes:
right (the same result as without damage, or told that it is not), clear error (one of ours),
traceback, hang (60 s), silently wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from cluster_jobs import status
from cluster_jobs.report import write_report
from cluster_jobs.results.assignments import export_assignments
from cluster_jobs.results.evaluate import export_run
from deepclust import pretrain
from deepclust.errors import DeepclustError, RequeueWanted
from deepclust.launch.start import resume
from deepclust.run.directory import Run
from deepclust.stages import extract
from tests.tiny import tiny_recipe, tiny_shards
from tools.bench.outcomes import show

HANG_S = 60
DAMAGES = ("half", "flip", "flip again", "tail", "gone", "pipe")
Show = Callable[[dict[str, Any]], None]


class Hang(BaseException):
    """A verb that did not end."""


def main() -> None:
    """Make the runs, damage them, and print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--every", type=int, default=1, help="of the cases, one in so many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-runs-") as folder:
        table, worst = fuzz(Path(folder), args.every, args.seed)
    show(table, worst, args.out)


def fuzz(folder: Path, every: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return the counts of outcomes by run and verb, and a line for each case that is not right."""
    extract.SMALLEST_CHUNK = 16  # so that an extraction has several chunks
    shards = tiny_shards(folder / "shards", n=96)
    overrides = ("train.epochs=3", "train.log=1", "keep.checkpoints=5", "train.checkpoint=2 steps")
    recipe = tiny_recipe(shards, *overrides)
    runs = {name: folder / name for name in ("finished", "in extraction", "in training")}
    pretrain(recipe, runs["finished"])
    interrupt(recipe, runs["in extraction"], lambda r: r.get("event") == "unit" and r["unit"] == 2)
    interrupt(recipe, runs["in training"], lambda r: bool(r.get("progress")) and r.get("step") == 6)
    right = Results(folder, runs["finished"])
    table: dict[str, Counter[str]] = {}
    worst: list[str] = []
    draws = random.Random(seed)
    for name, run in runs.items():
        verbs = ("status", "report", "assignments", "export") if name == "finished" else ()
        for file, damage in cases(run):
            if draws.randrange(every):
                continue
            for verb in (*verbs, "resume"):
                outcome, why = right.judge(verb, name, run, file, damage)
                table.setdefault(f"{name}: {verb}", Counter())[outcome] += 1
                print(f"{name}: {verb} {file} {damage}: {outcome} {why[:150]}", flush=True)
                if outcome not in ("right", "clear error"):
                    worst.append(f"{outcome}: {verb} of {name}, {file} {damage}: {why}")
    return table, worst


def interrupt(recipe: Any, run: Path, at: Show) -> None:
    """Make a run that was asked to stop at a record, after the first round."""
    began: list[bool] = []

    def show(record: dict[str, Any]) -> None:
        began.extend([True] if record.get("event") == "training" else [])
        if began and at(record):
            os.kill(os.getpid(), signal.SIGUSR2)

    with contextlib.suppress(RequeueWanted):
        pretrain(recipe, run, show)


def cases(run: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file of a run with every damage."""
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        if file.name not in (".lock-guard",) and "logs" not in file.parts:
            for damage in DAMAGES:
                yield file.relative_to(run), damage


def harm(file: Path, damage: str) -> bool:
    """Damage a file, and return whether anything changed."""
    data = file.read_bytes()
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "half":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "tail":
        file.write_bytes(data + b"\0" * 16)
    elif damage.startswith("flip") and data:
        place = random.Random(f"{file.name}{damage}").randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    return bool(data) or damage in ("gone", "pipe")


class Results:
    """What the verbs give without damage, and the judge of what they give with it."""

    def __init__(self, folder: Path, finished: Path) -> None:
        self.folder, self.case = folder, folder / "case" / "run"
        self.right = {
            verb: self.run(verb, finished) for verb in ("assignments", "export", "resume")
        }

    def judge(self, verb: str, name: str, run: Path, file: Path, damage: str) -> tuple[str, str]:
        """Return the outcome of a verb on a damaged copy of a run, and why."""
        shutil.rmtree(self.case.parent, ignore_errors=True)
        shutil.copytree(run, self.case)
        harm(self.case / file, damage)
        told = io.StringIO()
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(HANG_S)
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                result = self.run(verb, self.case, told)
        except DeepclustError as error:
            return "clear error", str(error)
        except Hang:
            return "hang", ""
        except BaseException as error:
            return "traceback", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        is_right = verb not in self.right or same(result, self.right[verb])
        if is_right or "warning" in told.getvalue():
            return "right", ""
        return "silently wrong", ""

    def run(self, verb: str, run: Path, told: io.StringIO | None = None) -> Any:
        """Return the result of a verb."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        emit = (told or io.StringIO()).write
        if verb == "status":
            states = [status.status(one) for one in status.find_runs(run.parent)]
            json.dumps([state.as_dict() for state in states])
            assert states or not (run / "recipe.yaml").is_file()
            assert not [s for s in states if "Error:" in s.reason and s.reason[0] != "/"], states
            return None
        if verb == "report":
            write_report(run, out / "page.html")
            return None
        if verb == "assignments":
            export_assignments(run, out / "table.parquet")
            return pq.read_table(out / "table.parquet").to_pylist()
        if verb == "export":
            export_run(run, out / "net.safetensors", "safetensors", emit)  # type: ignore[arg-type]
            return load_file(out / "net.safetensors")
        resume(run, show=lambda record: emit("warning" if record.get("event") == "warning" else ""))
        return weights_and_rounds(Run(run))


def weights_and_rounds(run: Run) -> dict[str, np.ndarray]:
    """Return the exported weights and the assignments of all rounds of a run."""
    arrays = dict(load_file(run.path / "export" / "backbone.safetensors"))
    for number in range(3):
        file = run.round(number) / "assignments" / "assignments.npy"
        # of a finished run a damaged file is left as it is
        with contextlib.suppress(OSError, ValueError, EOFError):
            if file.is_file():
                arrays[f"round {number}"] = np.load(file)
    return arrays


def same(one: Any, other: Any) -> bool:
    """Return whether two results are equal, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    return bool(repr(one) == repr(other))


def _hangs(number: int, frame: object) -> None:
    raise Hang


if __name__ == "__main__":
    main()
