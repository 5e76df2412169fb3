"""The state of runs in words, read from the files of their directories and their job's queue."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster_jobs import job_file
from cluster_jobs.comparison import ENOUGH, judge
from cluster_jobs.evaluations import read_scores
from cluster_jobs.executors import executor_of
from cluster_jobs.executors.base import POLL_S, Executor, JobState
from cluster_jobs.pace import pace_of
from deepclust.errors import (
    DeepclustError,
    RecipeError,
    RequeueWanted,
    ResourceError,
    exit_code_of,
)
from deepclust.files import open_regular, reading
from deepclust.launch.start import is_finished
from deepclust.run import directory, lock
from deepclust.run.collapse import LINES, collapsed
from deepclust.run.directory import Run
from deepclust.run.glance import newest_metrics

Record = dict[str, Any]
MOST_READ = 2**26  # bytes of a log that are printed at a time
PHASES = {  # what goes on after an event
    "started": "start",
    "unit": "extract",
    "extracted": "whiten",
    "whitening": "project",
    "features": "cluster",
    "clustered": "train",
    "training": "train",
    "finished": "done",
    "waiting": "wait",
}


@dataclass(frozen=True)
class Status:
    """A run at a glance.

    `state` is PENDING, RUNNING, RECOVERING (a worker group restarts), SUCCEEDED, STOPPED, FAILED
    or DIED.
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
    reassigned: float | None = None  # share of the images in another cluster than a round before
    nmi_labels: float | None = None  # where the shards have labels
    knn: float | None = None  # top-1 on labelled images, of the newest evaluation (train.evaluate)
    best_knn: float | None = None  # of the checkpoint that is kept as the best
    best_step: int | None = None
    collapse: str | None = None  # what the metrics say about one
    worse: str | None = None  # than which baseline the newest evaluation is, and by how much
    owner: str | None = None
    reason: str = ""
    exit_code: int = 0  # of the controller that brought the run to this end
    started: float | None = None  # seconds since 1970
    elapsed: float | None = None  # seconds of all attempts, without the time between them
    eta: float | None = None  # seconds until the end, of a run that goes on

    def as_dict(self) -> Record:
        """Return the fields, for `--json`."""
        return asdict(self)


def find_runs(folder: Path) -> list[Run]:
    """Return the run that a folder is, or the runs in it."""
    with reading(folder):
        if not folder.is_dir():
            raise RecipeError(f"{folder} is not a folder: give a run, or a folder of runs")
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    if "recipe.yaml" in names:
        return [Run(folder)]
    return [Run(folder / name) for name in names if _may_be_run(folder / name)]


def _may_be_run(folder: Path) -> bool:
    """Return whether a folder holds a recipe, or may hold one that we cannot see."""
    try:
        os.lstat(folder / "recipe.yaml")
        return True
    except (NotADirectoryError, FileNotFoundError):
        return False
    except OSError:  # of another user: a line says so
        return folder.is_dir()


def statuses(runs: Sequence[Run]) -> list[Status]:
    """Return the state of each run; a queue is asked once for all of them."""
    jobs = Jobs([run.path for run in runs])
    return [status(run, jobs) for run in runs]


class Jobs:
    """What queues say of the jobs of some runs: all are asked for when the first is needed."""

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        self._run_dirs = run_dirs
        self._known: dict[Path, JobState | None] = {}

    def state(self, run_dir: Path) -> JobState | None:
        """Return what the queue says of the run's job, as `Executor.state` does."""
        if run_dir not in self._known:
            where = executor_of(run_dir)
            self._known |= where.states(self._same(where) if where.asks_together else [run_dir])
        return self._known[run_dir]

    def _same(self, where: Executor[Any]) -> list[Path]:
        return [run_dir for run_dir in self._run_dirs if _submitted_to(run_dir) == where.name]


def _submitted_to(run_dir: Path) -> str | None:
    try:
        return str(job_file.read(run_dir)["on"])
    except DeepclustError:  # its own line says so
        return None


def status(run: Run, jobs: Jobs | None = None) -> Status:
    """Return the state of a run, from its lock, events, metrics and the queue of its job."""
    try:
        return _status(run, jobs or Jobs([run.path]))
    except Exception as error:  # whatever is wrong with one run must not hide the others
        ours = isinstance(error, DeepclustError)
        reason = first_line(str(error)) if ours else f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", 1)
        name = os.path.basename(os.path.abspath(run.path))
        return Status(name, "FAILED", "", 0, reason=first_line(reason), exit_code=code)


def first_line(text: str) -> str:
    """Return the first line of a text, which may be empty and is of a length for a table."""
    return (text.splitlines() or [""])[0][:500]


def _status(run: Run, jobs: Jobs) -> Status:
    owner = lock.owner(run.path)
    events = [event for event in run.events() if event["event"] != "notified"]
    state, reason, code = _state(run, jobs, owner, events)
    trained, rounds = newest_metrics(run.path / "metrics.jsonl", "train", LINES), run.rounds()
    last = trained[-1] if trained else {}
    clustered = next((e for e in reversed(events) if e["event"] == "clustered"), None)
    newest: Record = clustered or {}
    evaluated = [event for event in events if event["event"] == "evaluated"]
    score: Record = evaluated[-1] if evaluated else {}
    tops = {event["step"]: event["top1"] for event in evaluated}
    pace, now = pace_of(events, trained), time.time()
    return Status(
        name=run.path.resolve().name,
        state=state,
        phase=_phase(events),
        epochs=run.epochs,
        round=rounds[-1] if rounds else None,
        epoch=last.get("epoch"),
        step=last.get("step"),
        loss=last.get("loss"),
        images_per_s=last.get("images_per_s"),
        clusters=newest["k"] - newest["empty"] if newest else None,
        k=newest.get("k"),
        reassigned=newest.get("reassigned"),
        nmi_labels=newest.get("nmi_labels"),
        knn=score.get("top1"),
        best_knn=tops.get(score.get("best")),
        best_step=score.get("best"),
        collapse=collapsed(trained),
        worse=_worse(run, state),
        owner=owner,
        reason=reason,
        exit_code=code,
        started=pace.started,
        elapsed=None if pace.started is None else pace.spent(now) if owner else pace.elapsed,
        eta=pace.left(now) if owner else None,
    )


def _worse(run: Run, state: str) -> str | None:
    """Return the sentence of an evaluation that is worse than a baseline, if the newest one is."""
    try:
        scores, _ = read_scores(run)
    except DeepclustError as error:  # a damaged file does not end the status
        return f"the scores cannot be read: {first_line(str(error))}"
    ended = state == "SUCCEEDED"
    result = judge(scores, lambda step: step is None or step >= ENOUGH or ended)
    return None if result is None or result.good else result.text


def _state(run: Run, jobs: Jobs, owner: str | None, events: list[Record]) -> tuple[str, str, int]:
    """Return state, reason and exit code, by the lock, the queue and the newest event."""
    if owner and lock.owner_job(run.path) is None:
        return _controlled(events)
    if is_finished(run, events):
        return _controlled(events) if owner else ("SUCCEEDED", "", 0)
    job = jobs.state(run.path)
    # a job that its queue has ended may still hold the lock, until its heartbeat is old
    if owner and (job is None or job.phase in ("running", "submitted", "unknown")):
        return _controlled(events)
    since = job_file.read(run.path).get("time") or 0
    own = [event for event in events if event["time"] >= since]
    return (job and _queued(job, own)) or _ended(run, job, events)


def _queued(job: JobState, own: list[Record]) -> tuple[str, str, int] | None:
    """Return state, reason and exit code by the job's queue, or None when the events know more.

    `own` are the events since the job was submitted.
    """
    match job.phase:
        case "waiting":
            return "PENDING", job.text, 0
        case "running":
            return "RUNNING", job.text, 0
        case "stopped":
            return "STOPPED", job.text, RequeueWanted.exit_code
        case "failed":
            last = own[-1] if own else {"event": None}
            if last["event"] == "stopped" and last["kind"] != RequeueWanted.__name__:
                return None
            return "FAILED", job.text, ResourceError.exit_code
        case "unknown":
            return None if own else ("PENDING", job.text, 0)
        case "submitted":
            return None


def _ended(run: Run, job: JobState | None, events: list[Record]) -> tuple[str, str, int]:
    """Return state, reason and exit code of a run without a controller, by its newest event."""
    if not events:
        return "PENDING", job.text if job else "not started yet", 0
    last = events[-1]
    if last["event"] != "stopped" and job is not None and job.phase == "unknown":
        return "DIED", f"ended without a recorded reason, or is queued again; {job.text}", 1
    if last["event"] != "stopped":
        return "DIED", f"ended without a recorded reason; deepclust resume {run.path}", 1
    code = exit_code_of(last["kind"])
    if last["kind"] in ("RequeueWanted", "KeyboardInterrupt", "Stage"):
        return "STOPPED", last["text"], code
    return "FAILED", f"{last['kind']}: {first_line(last['text'])}", code


def _controlled(events: list[Record]) -> tuple[str, str, int]:
    """Return the state of a run with a controller, which may wait for room or recover."""
    names = ("waiting", "fault", "placed", "started", "stopped")
    recent = [event for event in events if event["event"] in names]
    if recent and recent[-1]["event"] == "waiting":
        return "PENDING", recent[-1]["text"], 0
    fault = next((e for e in reversed(recent) if e["event"] in ("fault", "placed")), None)
    if fault is not None and fault["event"] == "fault":
        return "RECOVERING", f"{fault['who']}: {fault['cause']}: {fault['text']}", 0
    return "RUNNING", "", 0


def _phase(events: list[Record]) -> str:
    """Return the part of the pipeline that goes on after the newest event."""
    names = [event["event"] for event in events if event["event"] in PHASES]
    return PHASES[names[-1]] if names else ""


def follow(run_dir: Path, emit: Callable[[str], None]) -> Status:
    """Emit the log from its beginning until the run has ended, and return how it ended.

    Raises `ResourceError` when its controller does not come any more.
    """
    directory.open_run(run_dir)
    poll_s = executor_of(run_dir).poll_s
    while (now := status(Run(run_dir))).state == "PENDING" and now.owner is None:
        if not _may_come(run_dir) and _is_pending_still(run_dir):
            raise ResourceError(f"{run_dir} ended before its controller began: {now.reason}")
        time.sleep(poll_s)
    for line in tail(run_dir, 0, follow=True):
        emit(line)
    return status(Run(run_dir))


def _is_pending_still(run_dir: Path) -> bool:
    """Return whether the run has not begun since; asked after its job was seen to be gone."""
    return status(Run(run_dir)).state == "PENDING" and lock.owner(run_dir) is None


def _may_come(run_dir: Path) -> bool:
    """Return whether the run's job is queued, or its queue does not answer now."""
    try:
        return executor_of(run_dir).is_pending(run_dir)
    except ResourceError:
        return True


def tail(run_dir: Path, rank: int, follow: bool, last: int | None = None) -> Iterator[str]:
    """Yield the lines of a rank's log and of the controller's, with `follow` until the end.

    `last`: of each log no more than so many of the lines that are there at first.
    """
    folder = directory.open_run(run_dir).path / "logs"
    names = ("controller.log", f"rank-{rank:05d}.log", f"rank-{rank}.out", "cluster-worker.out")
    offsets = dict.fromkeys(names, 0)
    while True:
        held = lock.owner(run_dir) is not None
        goes_on = held or (follow and _will_start(run_dir))
        for name in names:
            lines = _all_new_lines(folder / name, offsets)
            yield from lines if last is None else deque(lines, last)
        last = None
        if not follow or not goes_on:
            return
        time.sleep(POLL_S if held else executor_of(run_dir).poll_s)


def _will_start(run_dir: Path) -> bool:
    """Return whether a queue will start the run's job, or is about to, as far as it is known."""
    if is_finished(Run(run_dir)):
        return False
    job = executor_of(run_dir).state(run_dir)
    return job is not None and (job.is_pending or job.may_answer_later)


def _all_new_lines(file: Path, offsets: dict[str, int]) -> Iterator[str]:
    while lines := _new_lines(file, offsets):
        yield from lines


def _new_lines(file: Path, offsets: dict[str, int]) -> list[str]:
    """Return the whole lines that were added since the last call."""
    if not os.path.lexists(file):
        return []
    with reading(file), open_regular(file) as log:
        log.seek(offsets[file.name])
        data = log.read(MOST_READ)
    # a line may be longer than what is read at a time
    whole = data if len(data) == MOST_READ else data[: data.rfind(b"\n") + 1]
    offsets[file.name] += len(whole)
    return whole.decode(errors="replace").splitlines()
