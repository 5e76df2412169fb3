"""Damage every file of a finished and of interrupted runs, and count what the verbs make of it.

    python -m tools.bench.fuzz_runs [--out table.json] [--every 1] [--seed 0] [--log cases.jsonl]

A file is cut in half, has a bit flipped (twice, in small texts ten times), has another digit (of
those texts), NUL bytes at its end or all through it, is empty, is gone, or is a pipe. Then status,
report, assignments, export, evaluate and resume work on the run, in this process.
Outcomes: right (the same result as without damage), told other (another one, with a warning), clear
error (one of ours), traceback, hang (60 s), silently wrong. With `--log` a second call does only
what the first did not get to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from cluster_jobs import status
from cluster_jobs.report import write_report
from cluster_jobs.results.assignments import export_assignments
from cluster_jobs.results.evaluate import evaluate_run
from cluster_jobs.results.export import export_run
from deepclust import pretrain
from deepclust.errors import DeepclustError, RequeueWanted
from deepclust.files import append_json, read_json, read_jsonl, write_json
from deepclust.launch.start import resume
from deepclust.run.directory import Run
from deepclust.stages import extract
from tests.tiny import tiny_recipe, tiny_shards
from tools.bench.outcomes import show
from tools.bench.turns import Turns

HANG_S = 60
BASIC = ("half", "flip", "gone")
MORE = (*BASIC, "empty", "pipe")
DAMAGES = {  # of each run, which is tried in this order
    "finished": (*MORE, "flip again", "tail", "zeros"),
    "in training": MORE,
    "in clustering": BASIC,
    "in extraction": BASIC,
}
FLIPS = tuple(f"flip {number}" for number in range(3, 11))  # more, of these:
DIGITS = tuple(f"digit {number}" for number in range(1, 7))  # so that it is still a valid text
TEXTS = ("recipe.yaml", "data.json", "settled.json", "state.json", "lock.json", "env.json")
DEAR = ("report", "evaluate")  # half a second each: not for every damage
VERBS = ("status", "assignments", "export", *DEAR, "resume")  # the last one writes
Show = Callable[[dict[str, Any]], None]


class Hang(BaseException):
    """A verb that did not end."""


class Case(NamedTuple):
    """A verb on a run of which one file is damaged."""

    run: str
    verb: str
    file: str
    damage: str


def main() -> None:
    """Make the runs, damage them, and print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--every", type=int, default=1, help="of the cases, one in so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="a line for each case, which is not done again")
    parser.add_argument("--lock", type=Path, help="a file to lock while a case is tried")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-runs-") as folder:
        table, worst = fuzz(Path(folder), args.every, args.seed, args.log, args.lock)
    show(table, worst, args.out)


def fuzz(
    folder: Path, every: int, seed: int, log: Path | None = None, lock: Path | None = None
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return the counts of outcomes by run and verb, and a line for each case that is not right."""
    log = log or folder / "cases.jsonl"
    runs = make_runs(folder)
    right = Results(folder, runs)
    done = {Case(*record["case"]) for record in read_jsonl(log)}
    draws, turns = random.Random(seed), Turns(lock)
    for name in DAMAGES:
        for file, damage in cases(runs[name], DAMAGES[name]):
            if draws.randrange(every):
                continue
            left = [Case(name, verb, str(file), damage) for verb in verbs_of(name, damage)]
            left = [case for case in left if case not in done]
            if not left:
                continue
            turns.next()
            right.put_copy(name)
            harm(right.copy / file, damage)
            for case in left:
                outcome, why = right.judge(case)
                append_json(log, {"case": case, "outcome": outcome, "why": why[:600]})
    return counted(log)


def verbs_of(name: str, damage: str) -> list[str]:
    """Return the verbs that are tried on a run with a damage."""
    is_whole = name in ("finished", "in training") and damage in BASIC
    return [verb for verb in VERBS if is_whole or verb not in DEAR]


def counted(log: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return the table of a log, and a line for each bad case."""
    table: dict[str, Counter[str]] = {}
    worst = []
    for record in read_jsonl(log):
        case, outcome = Case(*record["case"]), record["outcome"]
        table.setdefault(f"{case.run}: {case.verb}", Counter())[outcome] += 1
        if outcome in ("traceback", "hang", "silently wrong"):
            worst.append(f"{outcome}: {' '.join(case)}: {record['why']}")
    return table, worst


def make_runs(folder: Path) -> dict[str, Path]:
    """Make a finished run, two that were asked to stop, and one as a kill leaves it."""
    extract.SMALLEST_CHUNK = 16  # so that an extraction has several chunks
    shards = tiny_shards(folder / "shards", n=96)
    overrides = ("train.epochs=3", "train.log=1", "keep.checkpoints=3", "train.checkpoint=2 steps")
    recipe = tiny_recipe(shards, *overrides)
    runs = {name: folder / name.replace(" ", "-") for name in DAMAGES}

    def copy(record: dict[str, Any]) -> None:
        if record.get("event") == "features" and record["round"] == 1:
            shutil.copytree(runs["finished"], runs["in clustering"])
            lock = runs["in clustering"] / "lock.json"
            write_json(lock, {**read_json(lock), "pid": 2**22 + 1})  # as if this process were dead
            # a damaged name of the host or the boot holds a run for two minutes; these have passed
            os.utime(lock, (time.time() - 600,) * 2)

    pretrain(recipe, runs["finished"], copy)
    interrupt(recipe, runs["in extraction"], lambda r: r.get("event") == "unit" and r["unit"] == 2)
    interrupt(recipe, runs["in training"], lambda r: bool(r.get("progress")) and r.get("step") == 6)
    return runs


def interrupt(recipe: Any, run: Path, at: Callable[[dict[str, Any]], bool]) -> None:
    """Make a run that was asked to stop at a record, after the first round."""
    began: list[bool] = []

    def show(record: dict[str, Any]) -> None:
        began.extend([True] if record.get("event") == "training" else [])
        if began and at(record):
            os.kill(os.getpid(), signal.SIGUSR2)

    with contextlib.suppress(RequeueWanted):
        pretrain(recipe, run, show)


def cases(run: Path, damages: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Yield every file of a run with every damage."""
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        if file.name in (".lock-guard",):
            continue
        for damage in (*damages, *((*FLIPS, *DIGITS) if file.name in TEXTS else ())):
            yield file.relative_to(run), damage


def harm(file: Path, damage: str) -> None:
    """Damage a file, and leave its times as they are."""
    data, times = file.read_bytes(), file.stat()
    file.unlink()
    _write_damaged(file, data, damage)
    if file.exists():
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _write_damaged(file: Path, data: bytes, damage: str) -> None:
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "half":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "tail":
        file.write_bytes(data + b"\0" * 16)
    elif damage in ("empty", "zeros"):
        file.write_bytes(bytes(len(data) if damage == "zeros" else 0))
    elif damage.startswith("digit"):
        draws = random.Random(damage)
        places = [match.start() for match in re.finditer(rb"\d", data)]
        place = draws.choice(places) if places else 0
        file.write_bytes(data[:place] + b"%d" % draws.randrange(1, 9) + data[place + 1 :])
    elif damage.startswith("flip"):
        place = random.Random(f"{file.name}{damage}").randrange(max(1, len(data)))
        flipped = bytes(byte ^ 4 for byte in data[place : place + 1])
        file.write_bytes(data[:place] + flipped + data[place + 1 :])


class Results:
    """What the verbs give without damage, and the judge of what they give with it."""

    def __init__(self, folder: Path, runs: dict[str, Path]) -> None:
        self.folder, self.runs, self.copy = folder, runs, folder / "case" / "run"
        self.right = {(name, verb): self.undamaged(name, verb) for name in runs for verb in VERBS}

    def undamaged(self, name: str, verb: str) -> Any:
        """Return a verb's result of a whole run, or None where it gives an error."""
        self.put_copy("finished" if verb == "resume" else name)
        with contextlib.suppress(DeepclustError):
            return self.run(verb, lambda text: None)
        return None

    def put_copy(self, name: str) -> None:
        """Copy a run to where the verbs look at it."""
        shutil.rmtree(self.copy.parent, ignore_errors=True)
        shutil.copytree(self.runs[name], self.copy)

    def judge(self, case: Case) -> tuple[str, str]:
        """Return the outcome of a verb on the damaged copy, and why."""
        told: list[str] = []
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(HANG_S)
        try:
            result = self.run(case.verb, told.append)
        except DeepclustError as error:
            return "clear error", str(error)
        except Hang:
            return "hang", ""
        except BaseException as error:
            return "traceback", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        if same(result, self.right[case.run, case.verb]):
            return "right", ""
        warnings = " ".join(text for text in told if text)
        return "told other" if warnings else "silently wrong", warnings or str(result)

    def run(self, verb: str, emit: Callable[[str], None]) -> Any:
        """Return the result of a verb on the copy; `emit` is given its warnings."""
        run, out = self.copy, self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if verb == "status":
            return self.states(emit)
        if verb == "report":
            write_report(run, out / "page.html")
            return None
        if verb == "assignments":
            export_assignments(run, out / "table.parquet")
            return pq.read_table(out / "table.parquet").to_pylist()
        if verb == "export":
            export_run(run, out / "net.safetensors", "safetensors", emit)
            return load_file(out / "net.safetensors")
        if verb == "evaluate":
            shards = str(self.folder / "shards")
            return evaluate_run(run, shards, shards, ["knn"], emit)
        resume(run, show=lambda record: emit(str(record if _warns(record) else "")))
        return weights_and_rounds(Run(run))

    def states(self, emit: Callable[[str], None]) -> list[str]:
        """Return the states of the runs in the folder; what is wrong with one is its reason."""
        states = [status.status(one) for one in status.find_runs(self.copy.parent)]
        json.dumps([state.as_dict() for state in states])
        assert states or not (self.copy / "recipe.yaml").is_file()
        assert not [s for s in states if "Error:" in s.reason and s.reason[0] != "/"], states
        emit(" ".join(state.reason for state in states) if states else "no run here")
        return [state.state for state in states]


def _warns(record: dict[str, Any]) -> bool:
    return record.get("event") == "warning"


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
