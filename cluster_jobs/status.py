"""What the run directories say: the state of a run in words, read from its files alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster_jobs import job_file
from cluster_jobs.slurm import queue
from deepclust.errors import DeepclustError, RecipeError, ResourceError, exit_code_of
from deepclust.launch.start import is_finished
from deepclust.run import directory, lock
from deepclust.run.directory import Run

POLL_S = 0.5
SILENT = "SILENT"  # for what Slurm does not say
QUEUE_POLL_S = 3.0  # Slurm's controller is shared


@dataclass(frozen=True)
class Status:
    """A run at a glance.

    `state` is PENDING, RUNNING, RECOVERING (a gang is being started again), SUCCEEDED, STOPPED,
    FAILED or DIED.
    """

    name: str
    state: str
    phase: str
    epochs: int
    round: int | None = None
    epoch: float | None = None
    step: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    clusters: int | None = None  # of the newest round that have images
    k: int | None = None
    reassigned: float | None = None  # share of the images that are elsewhere than a round before
    nmi_labels: float | None = None  # where the shards have labels
    owner: str | None = None
    reason: str = ""
    exit_code: int = 0  # of whoever brought it to this end

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def find_runs(folder: Path) -> list[Run]:
    """The run that a folder is, or the runs that lie in it."""
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not a folder: give a run, or a folder of runs")
    if directory.exists(folder):
        return [Run(folder)]
    return [Run(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))]


def status(run: Run) -> Status:
    """The state of a run, from its lock, events and metrics."""
    try:
        return _status(run)
    except DeepclustError as error:  # one broken run must not hide the others
        reason = str(error).splitlines()[0]
        return Status(run.path.resolve().name, "FAILED", "", 0, reason=reason)


def _status(run: Run) -> Status:
    owner = lock.owner(run.path)
    events = run.events()
    state, reason, code = _state(run, owner, events)
    trained = run.metrics("train")
    last = trained[-1] if trained else {}
    rounds = run.rounds()
    rounds_told = [event for event in events if event["event"] == "clustered"]
    clustered: dict[str, Any] = rounds_told[-1] if rounds_told else {}
    return Status(
        name=run.path.resolve().name, state=state, phase=_phase(events),
        epochs=run.recipe.train.epochs,
        round=rounds[-1] if rounds else None, epoch=last.get("epoch"), step=last.get("step"),
        loss=last.get("loss"), images_per_s=last.get("images_per_s"), k=clustered.get("k"),
        clusters=clustered["k"] - clustered["empty"] if clustered else None,
        reassigned=clustered.get("reassigned"), nmi_labels=clustered.get("nmi_labels"),
        owner=owner, reason=reason, exit_code=code,
    )  # fmt: skip


def _state(run: Run, owner: str | None, events: list[dict[str, Any]]) -> tuple[str, str, int]:
    """State, reason and exit code, by the lock and the newest event that says something."""
    seen = _seen(run)
    here = lock.owner_job(run.path) is None  # what Slurm has lost may still hold the run
    if owner and (here or seen is None or seen.lives or seen.state == SILENT):
        return _living(events)
    if is_finished(run):
        return "SUCCEEDED", "", 0
    if seen is not None and (found := _by_slurm(run, seen, events)):
        return found
    if not events:
        return "PENDING", _submitted(run), 0
    last = events[-1]
    if last["event"] != "stopped" and seen is not None and seen.state == SILENT:
        return "DIED", f"ended without a word, or is queued again; {seen.reason}", 1
    if last["event"] != "stopped":
        return "DIED", f"ended without a word; deepclust resume {run.path}", 1
    code = exit_code_of(last["kind"])
    if last["kind"] in ("RequeueWanted", "KeyboardInterrupt", "Stage"):
        return "STOPPED", last["text"], code
    return "FAILED", f"{last['kind']}: {last['text'].splitlines()[0]}", code


def _seen(run: Run) -> queue.Seen | None:
    """The run's job in Slurm's eyes, which may be closed."""
    try:
        return _looked(run)
    except ResourceError as error:
        return queue.Seen(SILENT, str(error).splitlines()[0])


def _looked(run: Run) -> queue.Seen | None:
    facts = job_file.read(run.path)
    if facts["on"] != "slurm" or "job" not in facts or is_finished(run):
        return None
    return queue.look(str(facts["job"]))


def _by_slurm(
    run: Run, seen: queue.Seen, events: list[dict[str, Any]]
) -> tuple[str, str, int] | None:
    """State, reason and exit code of a run that nobody holds; None when its own word says more."""
    facts = job_file.read(run.path)
    told = f"job {facts['job']}: {seen}"
    own = [event for event in events if event["time"] >= facts.get("time", 0)]
    if seen.waits:
        return "PENDING", told, 0
    if seen.lives:
        moving = "" if seen.state == "SUSPENDED" else ": coming up, or leaving"
        return "RUNNING", f"{told}{moving}", 0
    if seen.state == SILENT:
        return None if own else ("PENDING", f"job {facts['job']}: {seen.reason}", 0)
    if seen.ended.startswith("75:") or seen.state in ("CANCELLED", "TIMEOUT", "PREEMPTED"):
        return "STOPPED", f"{told}; deepclust resume {run.path} --on slurm", 75
    if own and own[-1]["event"] == "stopped" and own[-1]["kind"] != "RequeueWanted":
        return None  # in its own words
    number = seen.ended.partition(":")[0]
    code = f", exit code {number}" if number not in ("", "0") else ""
    return "FAILED", f"{told}{code}; see {job_file.output(run.path)}", 4


def _living(events: list[dict[str, Any]]) -> tuple[str, str, int]:
    """A run with a controller: it may be waiting for room, or beginning again after a fault."""
    told = [e for e in events if e["event"] in ("waiting", "fault", "placed", "started", "stopped")]
    last = told[-1] if told else {"event": "started"}
    if last["event"] == "waiting":
        return "PENDING", last["text"], 0
    fault = next((e for e in reversed(told) if e["event"] in ("fault", "placed")), None)
    if fault is not None and fault["event"] == "fault":
        return "RECOVERING", f"{fault['who']}: {fault['cause']}: {fault['text']}", 0
    return "RUNNING", "", 0


def _submitted(run: Run) -> str:
    facts = job_file.read(run.path)
    if "submission" in facts:
        return f"submitted to Ray at {facts['address']} as {facts['submission']}"
    return "not started yet"


def _phase(events: list[dict[str, Any]]) -> str:
    """What the newest telling event says is going on."""
    following = {
        "started": "start", "unit": "extract", "extracted": "whiten", "whitening": "project",
        "features": "cluster", "clustered": "train", "training": "train", "checkpoint": "train",
        "finished": "done", "waiting": "wait",
    }  # fmt: skip
    told = [e["event"] for e in events if e["event"] in following]
    return following[told[-1]] if told else ""


def follow(run: Path, echo: Callable[[str], None], pending: Callable[[], bool]) -> Status:
    """Echo the log from its beginning until the run has ended; how it ended.

    `pending` tells whether a controller that is not there yet may still come. Raises
    `ResourceError` when it will not.
    """
    found = directory.open_run(run)
    while (now := status(found)).state == "PENDING" and now.owner is None:
        if not _may_come(pending) and status(found).state == "PENDING" and lock.owner(run) is None:
            raise ResourceError(f"{run} ended before its controller began: {now.reason}")
        time.sleep(QUEUE_POLL_S if "job" in job_file.read(run) else POLL_S)
    for line in tail(run, 0, follow=True):
        echo(line)
    return status(found)


def _may_come(pending: Callable[[], bool]) -> bool:
    """Who does not answer may answer again."""
    try:
        return pending()
    except ResourceError:
        return True


def tail(run: Path, rank: int, follow: bool) -> Iterator[str]:
    """Lines of a rank's log and of the controller's; with `follow`, until the run ends."""
    folder = directory.open_run(run).path / "logs"
    names = ("controller.log", f"rank-{rank:05d}.log", f"rank-{rank}.out", "cluster-worker.out")
    files = dict.fromkeys(names, 0)
    while True:
        held = lock.owner(run) is not None
        alive = held or (follow and _queued(run))
        for name in files:
            yield from _new_lines(folder / name, files)
        if not follow or not alive:
            return
        time.sleep(POLL_S if held else QUEUE_POLL_S)


def _queued(run: Path) -> bool:
    """Whether Slurm will start the run's job, or is about to."""
    try:
        seen = _looked(Run(run))
    except ResourceError:
        return shutil.which("squeue") is not None  # it may answer again
    return seen is not None and (seen.waits or seen.lives)


def _new_lines(file: Path, seen: dict[str, int]) -> list[str]:
    if not file.exists():
        return []
    with open(file, "rb") as log:
        log.seek(seen[file.name])
        data = log.read()
    whole = data[: data.rfind(b"\n") + 1]
    seen[file.name] += len(whole)
    return whole.decode(errors="replace").splitlines()
