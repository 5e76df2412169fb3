"""Kill -9 at chosen moments of a run, as a power cut would: no handler runs, nothing is flushed.

A moment is something seen in the run directory (a stage that is under way, a temporary folder
that is not renamed yet). The victim is the controller, a rank, or the cluster worker.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from deepclust.files import read_jsonl
from deepclust.launch.warm import Fork
from deepclust.run.directory import Run, is_done
from tests.forks import start_command

Moment = Callable[[Path], bool]
PATIENCE_S = 300.0


def _round(run: Path, number: int, stage: str) -> Path:
    return run / "rounds" / f"{number:04d}" / stage


def extracting(run: Path) -> bool:
    """Some units of round 1 are there, not all."""
    raw = _round(run, 1, "raw")
    return any(raw.glob("unit-*.safetensors")) and not is_done(raw)


def whitening(run: Path) -> bool:
    """All units of round 1 are there, and no whitening."""
    return is_done(_round(run, 1, "raw")) and not is_done(_round(run, 1, "whitening"))


def clustering(run: Path) -> bool:
    """The features of round 1 are there, and no assignments."""
    return is_done(_round(run, 1, "features")) and not is_done(_round(run, 1, "assignments"))


def assigning(run: Path) -> bool:
    """The centroids of round 1 are there, and no assignments: two renames that belong together."""
    folder = _round(run, 1, "assignments")
    return is_done(_round(run, 1, "centroids")) and not is_done(folder)


def training(run: Path) -> bool:
    """The middle of an epoch of round 1: some steps, no checkpoint of them."""
    return is_done(_round(run, 1, "assignments")) and any(
        record["round"] == 1 for record in Run(run).metrics("train")
    )


def saving(run: Path) -> bool:
    """A checkpoint is being written: its temporary folder is there."""
    return any((run / "checkpoints").glob(".0*.tmp"))


MOMENTS: dict[str, Moment] = {
    "extraction": extracting,
    "whitening": whitening,
    "k-means": clustering,
    "between centroids and assignments": assigning,
    "mid-epoch": training,
    "checkpoint write": saving,
}


def start(*arguments: object) -> Fork:
    """A `deepclust` command in the background, in a new session."""
    with open(os.devnull, "wb") as quiet:
        return start_command([str(word) for word in arguments], quiet, quiet)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    return [pid, *(member for child in _children(pid) for member in family(child))]


def _children(pid: int) -> list[int]:
    """The children of all threads of a process: Ray's actors work in a thread of their own."""
    try:
        threads = [*Path(f"/proc/{pid}/task").iterdir()]
        return [int(n) for one in threads for n in (one / "children").read_text().split()]
    except OSError:
        return []


def kill_when(
    process: Fork,
    run: Path,
    moment: Moment,
    delay: float,
    victim: str = "controller",
) -> bool:
    """Kill the victim when the moment has come; whether it was killed while the moment lasted.

    The victim is the controller, or "rank 0", "rank 1", "cluster worker" of a worker group. When
    it is not the controller, that must begin again, and is waited for until the run has finished.
    """
    while not moment(run):
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    members = family(process.pid)
    chosen = [pid for pid in members if role(pid, process.pid) == victim]
    still = moment(run)
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)
    process.wait(PATIENCE_S)
    wait_until_gone(members)
    return still and bool(chosen) and process.returncode == code_after(victim)


def pause_when(process: Fork, run: Path, moment: Moment, victim: str) -> None:
    """Stop a process of the run when the moment has come, for good: it dies with its parent."""
    while not moment(run):
        assert process.poll() is None, "the run ended before the moment came"
        time.sleep(0.0005)
    for pid in family(process.pid):
        if role(pid, process.pid) == victim:
            os.kill(pid, signal.SIGSTOP)


def strike(process: Fork, run: Path, moment: Moment, victim: str, number: int) -> list[int]:
    """Send a signal when the moment has come; returns all processes that the run had then.

    The victim is "rank N", "cluster worker", or "reader" for the readers of rank 1.
    """
    while not moment(run):
        assert process.poll() is None, "the run ended before the moment came"
        time.sleep(0.0005)
    members, of = family(process.pid), "rank 1" if victim == "reader" else victim
    (struck,) = [pid for pid in members if role(pid, process.pid) == of]
    for pid in readers(struck) if victim == "reader" else [struck]:
        os.kill(pid, number)
    return members


def readers(rank: int) -> list[int]:
    """The reader processes of a rank: the children of its fork server."""
    return [pid for pid in family(rank) if pid not in (rank, *_children(rank))]


def code_after(victim: str) -> int:
    """How the controller ends when the victim is killed: by the same signal, or well."""
    return -signal.SIGKILL if victim == "controller" else 0


def role(pid: int, controller: int) -> str:
    """What a process of a run is: "controller", "rank N", "cluster worker", or "" for others."""
    if pid == controller:
        return "controller"
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
    return name if name.startswith(("rank ", "cluster worker")) else ""


def wait_until_gone(pids: list[int], patience: float = 20.0) -> None:
    """The children must die with their parent; raise if one is still running."""
    deadline = time.monotonic() + patience
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise AssertionError(f"still alive: {[pid for pid in pids if _alive(pid)]}")
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def stages_done_twice(run: Path) -> list[tuple[str, int]]:
    """Finished stages that events.jsonl shows more than once."""
    seen = [
        (event["event"], event["round"], event.get("unit"))
        for event in Run(run).events()
        if event["event"] in ("unit", "extracted", "whitening", "features", "clustered")
    ]
    return sorted(
        {(name, number) for name, number, unit in seen if seen.count((name, number, unit)) > 1}
    )


def redone_steps(run: Path) -> int:
    """The most steps that a restart did again: the last step before it, minus its first."""
    recorded = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    most = 0
    for event in Run(run).events():
        if event["event"] == "restored":
            before = [r["step"] for r in recorded if r["attempt"] < event["attempt"]]
            most = max(most, max(before, default=0) - event["step"])
    return most
