#!/usr/bin/env python3
"""What can happen to a run: kills at random instants, full disks, failing storage, other clocks.

    python tools/bench/disturbances.py [--kills 4] [--resumes 4] [--only NAME ...] [--out FILE]

Every try disturbs one run, undoes the disturbance, resumes, and compares weights, optimizers and
assignments with an undisturbed run. The table has, for every disturbance, how often the run

    identical       was not stopped by it, with the same bits
    clear error     ended with a message and an exit code of ours, and resumed to the same bits
    traceback       ended with one, or with another exit code
    hang            did not end within the limit
    silently other  ended well, with other bits

`identical` after a kill is after the resume. Disks and /dev/shm are small tmpfs in a namespace,
which needs root. Failing reads and clocks are a library that gcc makes here (LD_PRELOAD).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust.files import append_json, read_jsonl  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.world import generator  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tools.bench import shim  # noqa: E402
from tools.bench.forked import ForkedCommand  # noqa: E402
from tools.bench.turns import Turns  # noqa: E402

LIMIT_S = 300.0  # of one command; a failing storage is given 60 s
CLEAR = {2, 3, 4, 5, 6, 7, 8, 75, 130}
OUTCOMES = ("identical", "clear error", "traceback", "hang", "silently other")
STAGES = {  # what is opened for writing when a stage of the second round commits
    "index": "deepclust-index",
    "extract": "0001/raw/.unit",
    "whitening": "0001/.whitening",
    "features": "0001/raw/rows-",
    "k-means": "0001/.centroids",
    "assignments": "0001/.assignments",
    "checkpoint": "checkpoints/.0",
    "metrics": "metrics.jsonl",
    "events": "events.jsonl",
    "export": "export/",
    "log": "logs/",
}
OWN_FILES = {  # of a run, which a resume reads
    "recipe": "recipe.yaml",
    "events": "events.jsonl",
    "checkpoint": "checkpoints/0",
    "assignments": "assignments/",
    "index": "deepclust-index",
}
VERBS = ("assignments", "export", "report")
HOW = ("for 5 s", "for ever")
CHANGES = ("cut", "replaced", "removed")
WHO = ("rank 1", "cluster worker", "reader", "controller")


Process = subprocess.Popen[str] | ForkedCommand


class Place(NamedTuple):
    """The folders of a try."""

    work: Path
    run: Path
    whole: Path
    recipe: Path
    seconds: float  # of the undisturbed run


def main() -> None:
    """Run all, print the table, write the facts."""
    preload()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=4, help="with 1 rank, and with 2")
    parser.add_argument("--resumes", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-disturbances.jsonl"))
    parser.add_argument("--lock", type=Path, help="a file to lock while a try is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        own_mounts()
        places = {ranks: prepare(work, ranks) for ranks in (1, 2)}
        turns = Turns(args.lock)
        done = {(record["disturbance"], record["number"]) for record in read_jsonl(args.out)}
        for label, ranks, times, disturb in cases(args.kills, args.resumes):
            if args.only and not any(label.startswith(one) for one in args.only):
                continue
            for number in (n for n in range(times) if (label, n) not in done):
                turns.next()
                record = one(label, places[ranks], number, disturb)
                append_json(args.out, record)
                print(json.dumps(record), flush=True)
    print(table(read_jsonl(args.out)))


def cases(kills: int, resumes: int) -> list[tuple[str, int, int, Callable[..., str]]]:
    """Return label, ranks, tries, and the function that disturbs and returns the outcome."""
    both = (1, 2)
    return [
        *((f"kill -9 of all, {ranks} ranks", ranks, kills, kill) for ranks in both),
        ("two resumes at once", 1, resumes, two_resumes),
        *((f"ENOSPC at {stage}, 1 ranks", 1, 1, full_disk) for stage in STAGES),
        *((f"ENOSPC of {verb} --out", 1, 1, full_out) for verb in VERBS),
        *((f"disk of {size} kB", 1, 1, small_disk) for size in (64, 200, 400, 800, 1200)),
        *((f"EIO of writes at {stage}", 1, 1, failing_writes) for stage in STAGES),
        *((f"EIO of reads of {file} on resume", 1, 1, failing_resume) for file in OWN_FILES),
        *((f"EIO of shards {how}, {n} ranks", n, 1, failing_reads) for n in both for how in HOW),
        *((f"shard {how}, {n} ranks", n, 1, changed_shard) for n in both for how in CHANGES),
        ("index offsets cut", 1, 1, changed_shard),
        *((f"/dev/shm of 64 kB, {n} readers", 1, 1, small_shm) for n in (1, 4)),
        *((f"SIGSTOP of {who} for {how}", 2, 1, stopped) for who in WHO for how in ("5 s", "ever")),
        ("reader stopped, then TERM", 1, 1, stopped_reader),
        *((f"clock {days:+} days, {n} ranks", n, 1, clock) for n in both for days in (400, -400)),
        *((f"ENOSPC at {stage}, 2 ranks", 2, 1, full_disk) for stage in STAGES),
    ]


def preload() -> None:
    """Begin this process again with the library, which its forks need, and one thread each."""
    if "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(shim.make(Path(tempfile.mkdtemp())))
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def own_mounts() -> None:
    """Let the small disks that are mounted from here on vanish with this process."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        sys.exit("small disks are mounted in a namespace, which needs root")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextlib.contextmanager
def disk(place: Place, size: str) -> Iterator[Place]:
    """Mount a small disk on the folder of the run."""
    place.run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place.run], check=True)
    try:
        yield place._replace(run=place.run / "run")
    finally:
        subprocess.run(["umount", "-l", place.run], check=True)


def prepare(work: Path, ranks: int) -> Place:
    """Write shards, recipe and the undisturbed run."""
    place = Place(work, work / "run", work / f"whole-{ranks}", work / f"{ranks}.yaml", 0.0)
    shards = work / f"shards-{ranks}"
    tiny.tiny_shards(shards, n=600)
    settings = (f"train.ranks={ranks}", "train.batch=60", "train.checkpoint=5 steps",
                "train.epochs=3", "train.hang=20", "data.workers=1")  # fmt: skip
    tiny.tiny_recipe(shards, *settings).save(place.recipe)
    began = time.monotonic()
    code, text = end(begin(place, *tiny.command("pretrain", place.recipe, "--run", place.whole)))
    assert code == 0, text
    return place._replace(seconds=time.monotonic() - began)


def one(label: str, place: Place, number: int, disturb: Callable[..., str]) -> dict[str, Any]:
    """Make one try."""
    shutil.rmtree(place.run, ignore_errors=True)
    began = time.monotonic()
    try:
        outcome, text = disturb(place, label, number), ""
    except subprocess.TimeoutExpired as error:
        outcome, text = "hang", str(error)
    seconds = round(time.monotonic() - began, 1)
    return {
        "disturbance": label,
        "number": number,
        "outcome": outcome,
        "seconds": seconds,
        "text": text,
    }


def begin(place: Place, *words: str, **variables: str) -> Process:
    """Start a command in a session of its own, ours in a fork of this process."""
    ours = tiny.command()
    if list(words[: len(ours)]) == ours:
        return ForkedCommand(list(words[len(ours) :]), variables)
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **variables}, start_new_session=True,
    )  # fmt: skip


def pretraining(place: Place, *overrides: str) -> list[str]:
    """Return the command of the run."""
    return tiny.command("pretrain", place.recipe, "--run", place.run, *overrides)


def end(process: Process) -> tuple[int, str]:
    """Return exit code and stderr, or kill it after the limit."""
    try:
        _, text = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        members = killing.family(process.pid)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, text


def judge(place: Place, code: int, text: str, words: list[str] | None = None) -> str:
    """Return the outcome of a command that has ended: resumes it where it did not finish."""
    if code == 0:
        return "identical" if is_same(place) else "silently other"
    if code not in CLEAR or "Traceback" in text:
        return f"traceback: exit {code}: {text[-300:]}"
    print(text[-600:], flush=True)
    return "clear error" if resumed(place, words) else "silently other"


def resumed(place: Place, begun: list[str] | None = None) -> bool:
    """Resume the run (begin it, if it had not), and return whether it has the same bits."""
    words = tiny.command("resume", place.run)
    if not (place.run / "recipe.yaml").exists():
        words = begun or pretraining(place)
    code, text = end(begin(place, *words))
    if code:
        print(text[-2000:], file=sys.stderr)
    return code == 0 and is_same(place)


def is_same(place: Place) -> bool:
    """Whether the run is the undisturbed one, bit for bit."""
    try:
        tiny.assert_same_run(place.run, place.whole)
    except (AssertionError, OSError, ValueError, IndexError):
        return False
    return True


def wait_for(place: Place, event: str, process: Process) -> None:
    """Wait until the run has reported an event."""
    while process.poll() is None:
        if any(record["event"] == event for record in Run(place.run).events()):
            return
        time.sleep(0.01)


def kill(place: Place, label: str, number: int) -> str:
    """Kill everything at a random instant of the run, then resume."""
    readers = number % 2  # every second without, which ends in half of the time
    delay = generator(0, label, number).uniform(0.02, 0.5 + 0.5 * readers) * place.seconds
    process = begin(place, *pretraining(place, f"data.workers={readers}"))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    for pid in killing.family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return "identical" if resumed(place) else "silently other"


def stopped_run(place: Place) -> Path:
    """Return a run that was asked to stop in its first epoch, made once."""
    stopped = place.work / f"stopped-{place.whole.name}"
    if not stopped.exists():
        process = begin(place, *pretraining(place))
        wait_for(place, "training", process)
        process.send_signal(signal.SIGTERM)
        end(process)
        place.run.rename(stopped)
    return stopped


def two_resumes(place: Place, label: str, number: int) -> str:
    """Resume a stopped run twice at once: one goes on, the other is refused."""
    shutil.copytree(stopped_run(place), place.run)
    both = [begin(place, *tiny.command("resume", place.run)) for _ in range(2)]
    ended = [end(process) for process in both]
    if any("Traceback" in text for _, text in ended):
        return "traceback"
    if sorted(code for code, _ in ended) not in ([0, 7], [0, 0]):
        return f"traceback: exits {[code for code, _ in ended]}"
    return "identical" if is_same(place) else "silently other"


def small_disk(place: Place, label: str, number: int) -> str:
    """Run on a small disk, which becomes larger before the resume."""
    with disk(place, f"{label.split()[2]}k") as there:
        ended = end(begin(there, *pretraining(there)))
        subprocess.run(["mount", "-o", "remount,size=64m", place.run], check=True)
        return judge(there, *ended)


def full_disk(place: Place, label: str, number: int) -> str:
    """Let the disk be full just as a stage begins to write, and free it before the resume."""
    stage = label.split()[2].rstrip(",")
    with disk(place, "64m") as there:
        ballast = place.run / "ballast"
        words = pretraining(there, "data.workers=0")
        if stage == "index":
            shutil.copytree(place.work / "shards-1", place.run / "shards", ignore=_no_index)
            words.append(f"data.shards={place.run}/shards")
        fill = {"FILL_AT": STAGES[stage], "FILL_FILE": str(ballast)}
        ended = end(begin(there, *words, **fill))
        if not ballast.exists():
            return "traceback: the disk was never filled"
        ballast.unlink()
        return judge(there, *ended, words)


def _no_index(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == STAGES["index"]]


def full_out(place: Place, label: str, number: int) -> str:
    """Let a verb write its result to a full disk: an error, and nothing half-written."""
    verb = label.split()[2]
    suffix = {"assignments": "csv", "export": "safetensors", "report": "html"}[verb]
    with disk(place, "4k"):
        out = place.run / f"out.{suffix}"
        code, text = end(begin(place, *tiny.command(verb, place.whole, "--out", out)))
        if code not in CLEAR or "Traceback" in text:
            return f"traceback: exit {code}: {text[-300:]}"
        return "silently other" if list(place.run.iterdir()) else "clear error"


def failing_writes(place: Place, label: str, number: int) -> str:
    """Let writes of a stage fail, and mend the storage before the resume."""
    stage = label.split()[4]
    words = pretraining(place, "data.workers=0")
    if stage == "index":
        shards = place.work / "shards-eio"
        shutil.copytree(place.work / "shards-1", shards, ignore=_no_index, dirs_exist_ok=True)
        words.append(f"data.shards={shards}")
    return judge(place, *end(begin(place, *words, FAIL_WRITES=STAGES[stage])), words)


def failing_resume(place: Place, label: str, number: int) -> str:
    """Let reads of a run's own files fail while it is resumed."""
    shutil.copytree(stopped_run(place), place.run)
    switch = place.work / "fail"
    switch.touch()
    variables = {"FAIL_READS": str(switch), "READS_OF": OWN_FILES[label.split()[4]]}
    ended = end(begin(place, *tiny.command("resume", place.run), **variables))
    switch.unlink()
    return judge(place, *ended)


def small_shm(place: Place, label: str, number: int) -> str:
    """Run where /dev/shm is too small for a batch."""
    readers = label.split()[4]
    command = shlex.join(pretraining(place, f"data.workers={readers}"))
    script = f"mount -t tmpfs -o size=64k none /dev/shm && exec {command}"
    return judge(place, *end(begin(place, "unshare", "-m", "sh", "-c", script)))


def failing_reads(place: Place, label: str, number: int) -> str:
    """Let reads of shards fail for a while, or until the run has ended."""
    switch = place.work / "fail"
    process = begin(place, *pretraining(place), FAIL_READS=str(switch))
    wait_for(place, "training", process)
    switch.touch()
    if "for ever" not in label:
        time.sleep(5)
        switch.unlink()
    ended = end(process)
    switch.unlink(missing_ok=True)
    return judge(place, *ended)


def changed_shard(place: Place, label: str, number: int) -> str:
    """Change a shard, or the index, while the run trains, and put it back before the resume."""
    shards = place.work / place.whole.name.replace("whole", "shards")
    file = max(shards.glob("*.tar"))
    if "index" in label:
        file = next(shards.rglob("offsets.npy"))
    kept = place.work / "kept"
    shutil.copy2(file, kept)
    process = begin(place, *pretraining(place))
    wait_for(place, "training", process)
    if "cut" in label:
        os.truncate(file, 64)
    elif "replaced" in label:
        other = file.with_name(".other")
        other.write_bytes(kept.read_bytes()[: 1 << 14])
        other.replace(file)
    else:
        file.unlink()
    ended = end(process)
    shutil.copy2(kept, file)
    return judge(place, *ended)


def clock(place: Place, label: str, number: int) -> str:
    """Let the clock jump while the run trains."""
    switch = place.work / "jump"
    days = str(int(label.split()[1]))
    process = begin(place, *pretraining(place), MOVE_CLOCK=str(switch), CLOCK_DAYS=days)
    wait_for(place, "training", process)
    switch.touch()
    ended = end(process)
    switch.unlink()
    return judge(place, *ended)


def stopped(place: Place, label: str, number: int) -> str:
    """Stop a process of the run for a while, or until it is given up."""
    who, _, time_ = label.removeprefix("SIGSTOP of ").partition(" for ")
    process = begin(place, *pretraining(place, "train.hang=30"))
    wait_for(place, "training", process)
    pids = members(place.run, process.pid, who)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    if time_ != "ever" or who == "controller":
        time.sleep(40.0 if time_ == "ever" else 5.0)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return judge(place, *end(process))


def members(run: Path, controller: int, who: str) -> list[int]:
    """Return the processes of a run with a role; readers are those of rank 1."""
    placed = [event for event in Run(run).events() if event["event"] == "placed"][-1]["members"]
    pids = {place["who"]: place["pid"] for place in placed} | {"controller": controller}
    if who != "reader":
        return [pids[who]]
    while not (readers := killing.readers(pids["rank 1"])):
        time.sleep(0.05)
    return readers


def stopped_reader(place: Place, label: str, number: int) -> str:
    """Stop the reader, and ask the run to stop: it must hear that."""
    process = begin(place, *pretraining(place))
    wait_for(place, "training", process)
    for pid in killing.readers(process.pid):
        os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    return judge(place, *end(process))


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown: how often each disturbance had each outcome."""
    lines = ["| disturbance | tries | " + " | ".join(OUTCOMES) + " |"]
    lines.append("|---" * (len(OUTCOMES) + 2) + "|")
    for label in dict.fromkeys(record["disturbance"] for record in records):
        mine = [record for record in records if record["disturbance"] == label]
        counts = Counter(record["outcome"].partition(":")[0] for record in mine)
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {label} | {len(mine)} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
