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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust.files import append_json, read_jsonl  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.world import generator  # noqa: E402
from tests import killing, tiny  # noqa: E402 - the harness of the tests
from tools.bench.turns import turn  # noqa: E402

LIMIT_S = 150.0  # of one command; a failing storage is given 60 s
CLEAR = {2, 3, 4, 5, 6, 7, 8, 75, 130}
OUTCOMES = ("identical", "clear error", "traceback", "hang", "silently other")
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
static int on(const char *name) { char *file = getenv(name); return file && !access(file, F_OK); }
static int is_shard(int fd) {
  char link[64], path[4096]; snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 4) return 0; path[n] = 0; return strstr(path, ".tar") != NULL; }
#define READER(name, offset) ssize_t name(int fd, void *to, size_t n, offset at) { \
  if (on("FAIL_READS") && is_shard(fd)) { errno = EIO; return -1; } \
  ssize_t (*real)(int, void *, size_t, offset) = dlsym(RTLD_NEXT, #name); \
  return real(fd, to, n, at); }
READER(pread, off_t)
READER(pread64, off64_t)
int clock_gettime(clockid_t clock, struct timespec *now) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(clock, now);
  if (clock == CLOCK_REALTIME && on("JUMP_CLOCK")) now->tv_sec += 400 * 86400;
  return code; }
"""


class Place(NamedTuple):
    """The folders of a try."""

    work: Path
    run: Path
    whole: Path
    recipe: Path


def main() -> None:
    """Run all, print the table, write the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=4, help="with 1 rank, and with 2")
    parser.add_argument("--resumes", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-disturbances.jsonl"))
    parser.add_argument("--lock", type=Path, help="a file to lock while a try is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shim(work)
        places = {ranks: prepare(work, ranks) for ranks in (1, 2)}
        done = {(record["disturbance"], record["number"]) for record in read_jsonl(args.out)}
        for label, ranks, times, disturb in cases(args.kills, args.resumes):
            if args.only and not any(label.startswith(one) for one in args.only):
                continue
            for number in (n for n in range(times) if (label, n) not in done):
                with turn(args.lock):
                    record = one(label, places[ranks], number, disturb)
                append_json(args.out, record)
                print(json.dumps(record), flush=True)
    print(table(read_jsonl(args.out)))


def cases(kills: int, resumes: int) -> list[tuple[str, int, int, Callable[..., str]]]:
    """Return label, ranks, tries, and the function that disturbs and returns the outcome."""
    return [
        *((f"kill -9 of all, {ranks} ranks", ranks, kills, kill) for ranks in (1, 2)),
        ("two resumes at once", 1, resumes, two_resumes),
        *((f"disk of {size} kB", 1, 1, full_disk) for size in (64, 200, 400, 800, 1200)),
        *((f"/dev/shm of 64 kB, {n} readers", 1, 1, small_shm) for n in (1, 4)),
        ("EIO for 5 s", 1, 1, failing_reads),
        ("EIO for ever", 1, 1, failing_reads),
        *((f"shard {how}", 1, 1, changed_shard) for how in ("cut", "replaced", "removed")),
        ("index offsets cut", 1, 1, changed_shard),
        ("clock + 400 days", 1, 1, clock),
        ("reader stopped, then TERM", 1, 1, stopped_reader),
    ]


def shim(work: Path) -> None:
    """Make the library that fails reads and moves the clock."""
    (work / "shim.c").write_text(SHIM)
    words = [
        "gcc",
        "-w",
        "-shared",
        "-fPIC",
        "-o",
        str(work / "shim.so"),
        str(work / "shim.c"),
        "-ldl",
    ]
    subprocess.run(words, check=True)


def prepare(work: Path, ranks: int) -> Place:
    """Write shards, recipe and the undisturbed run."""
    place = Place(work, work / "run", work / f"whole-{ranks}", work / f"{ranks}.yaml")
    shards = work / f"shards-{ranks}"
    tiny.tiny_shards(shards, n=600)
    settings = (f"train.ranks={ranks}", "train.batch=60", "train.checkpoint=5 steps",
                "train.epochs=3", "train.hang=20", "data.workers=1")  # fmt: skip
    tiny.tiny_recipe(shards, *settings).save(place.recipe)
    tiny.deepclust("pretrain", place.recipe, "--run", place.whole)
    return place


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


def begin(place: Place, *words: str, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a session, with the library if variables for it are given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if variables:
        environment["LD_PRELOAD"] = str(place.work / "shim.so")
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def pretraining(place: Place, *overrides: str) -> list[str]:
    """Return the command of the run."""
    return tiny.command("pretrain", place.recipe, "--run", place.run, *overrides)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
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


def judge(place: Place, code: int, text: str) -> str:
    """Return the outcome of a command that has ended: resumes it where it did not finish."""
    if code == 0:
        return "identical" if is_same(place) else "silently other"
    if code not in CLEAR or "Traceback" in text:
        return f"traceback: exit {code}: {text[-300:]}"
    return "clear error" if resumed(place) else "silently other"


def resumed(place: Place) -> bool:
    """Resume the run (begin it, if it had not), and return whether it has the same bits."""
    words = tiny.command("resume", place.run)
    if not (place.run / "recipe.yaml").exists():
        words = pretraining(place)
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


def wait_for(place: Place, event: str, process: subprocess.Popen[str]) -> None:
    """Wait until the run has reported an event."""
    while process.poll() is None:
        if any(record["event"] == event for record in Run(place.run).events()):
            return
        time.sleep(0.01)


def kill(place: Place, label: str, number: int) -> str:
    """Kill everything at an instant of the first 12 s, then resume."""
    delay = generator(0, label, number).uniform(1.0, 12.0)
    process = begin(place, *pretraining(place))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    for pid in killing.family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return "identical" if resumed(place) else "silently other"


def two_resumes(place: Place, label: str, number: int) -> str:
    """Resume a stopped run twice at once: one goes on, the other is refused."""
    stopped = place.work / "stopped"
    if not stopped.exists():
        process = begin(place, *pretraining(place))
        wait_for(place, "training", process)
        process.send_signal(signal.SIGTERM)
        end(process)
        place.run.rename(stopped)
    shutil.copytree(stopped, place.run)
    both = [begin(place, *tiny.command("resume", place.run)) for _ in range(2)]
    ended = [end(process) for process in both]
    if any("Traceback" in text for _, text in ended):
        return "traceback"
    if sorted(code for code, _ in ended) not in ([0, 7], [0, 0]):
        return f"traceback: exits {[code for code, _ in ended]}"
    return "identical" if is_same(place) else "silently other"


def full_disk(place: Place, label: str, number: int) -> str:
    """Run on a small disk, which is copied to a large one before the resume."""
    size, small = label.split()[2], place.work / "small"
    small.mkdir(exist_ok=True)
    command = shlex.join(tiny.command("pretrain", place.recipe, "--run", small / "run"))
    script = (
        f"mount -t tmpfs -o size={size}k none {small} && {command}; code=$?; "
        f"cp -a {small}/run {place.run}; exit $code"
    )
    return judge(place, *end(begin(place, "unshare", "-m", "sh", "-c", script)))


def small_shm(place: Place, label: str, number: int) -> str:
    """Run where /dev/shm is too small for a batch."""
    readers = label.split()[4]
    command = shlex.join(pretraining(place, f"data.workers={readers}"))
    script = f"mount -t tmpfs -o size=64k none /dev/shm && {command}"
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
    shards = place.work / "shards-1"
    file = max(shards.glob("*.tar"))
    if "index" in label:
        file = next(shards.rglob("offsets.npy"))
    kept = place.work / "kept"
    shutil.copy2(file, kept)
    process = begin(place, *pretraining(place))
    wait_for(place, "training", process)
    if label.endswith("cut"):
        os.truncate(file, 64)
    elif label.endswith("replaced"):
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
    process = begin(place, *pretraining(place), JUMP_CLOCK=str(switch))
    wait_for(place, "training", process)
    switch.touch()
    ended = end(process)
    switch.unlink()
    return judge(place, *ended)


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
