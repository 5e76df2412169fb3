"""Starting and resuming a run on this machine: one process, or a gang of ranks.

Nothing here imports torch before the run directory stands and its lock is held. A gang is N
trainer ranks and the cluster worker, one process each; the launcher is their controller: it
writes the events, passes signals on, and when one dies it stops the others and says who it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deepclust import errors
from deepclust.errors import DeepclustError, RecipeError, RequeueWanted, ResourceError
from deepclust.files import disk_errors
from deepclust.launch.role import CLUSTER_WORKER, Role
from deepclust.recipe import Recipe, differences
from deepclust.recipe.sections import PLACES, SHARDS, Section
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold

Show = Callable[[dict[str, Any]], None]
MAY_CHANGE = ("train.ranks", "data.workers", "data.stage", "data.scratch")
HELD_BACK = {signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}


def pretrain(recipe: Recipe, run: str | Path, show: Show | None = None) -> Run:
    """Pretrain by a recipe into a new run directory, in the foreground; returns the run.

    Raises the errors of `deepclust.errors`; whatever was finished before stays and `resume`
    continues from it.
    """
    path = Path(run)
    prepare_run(recipe, path)
    return _start(path, show)


def prepare_run(recipe: Recipe, path: Path) -> None:
    """Make the run directory, with what this machine decides written into the recipe."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with hold(path):
        directory.create(path, resolved(recipe))


def resume(run: str | Path, *overrides: str, show: Show | None = None) -> Run:
    """Continue a run from what is on disk; a finished one is left as it is.

    Ranks and workers may change, and `train.epochs` may grow; any other difference raises
    `RunDiffersError`.
    """
    found = directory.open_run(run)
    recipe = found.recipe.replace(*overrides)
    check_changes(found, recipe)
    with hold(found.path):
        if recipe != found.recipe:
            recipe.save(found.path / "recipe.yaml")
    return _start(found.path, show)


def run_stage(run: str | Path, stage: str, show: Show | None = None) -> Run:
    """Do one stage (extract, cluster or train) of a run, then stop; `resume` does the rest.

    Raises `RecipeError` for a run with `cluster.overlap`, where no stage is alone.
    """
    found = directory.open_run(run)
    if found.recipe.cluster is None:
        raise RecipeError(f"{found.path} trains on no clustering, so it has no stages to run alone")
    if found.recipe.cluster.overlap:
        raise RecipeError(
            f"{found.path} trains while it clusters (cluster.overlap), so its stages cannot be run "
            f"one at a time: deepclust resume {found.path}"
        )
    return _start(found.path, show, stage)


def is_finished(run: Run) -> bool:
    """Whether the run has been trained to the end of its recipe."""
    finished = [e for e in run.events() if e["event"] == "finished"]
    return bool(finished) and finished[-1]["epochs"] >= run.recipe.train.epochs


def resolved(recipe: Recipe) -> Recipe:
    """Write down what this machine decides, so that the run can be resumed from anywhere.

    Paths become absolute. Results on a CPU depend on the threads per rank: its share of the cores,
    less those that its reader processes keep busy. With overlap the cluster worker has a share too.
    """
    beside = recipe.cluster is not None and recipe.cluster.overlap
    share = _cores() // (recipe.train.ranks + beside)
    threads = recipe.train.threads or max(1, share - recipe.data.workers)
    data, init, seeds = recipe.data, recipe.init, recipe.seeds
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"threads": threads}),
            "data": data.model_copy(update=_absolute(data, "shards", "index", "scratch", "stage")),
            "init": init.model_copy(update=_absolute(init, "weights", "assignments")),
            "seeds": seeds and seeds.model_copy(update=_absolute(seeds, "labels", "held_out")),
        }
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux knows what a scheduler gave us
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _absolute(section: Section, *names: str) -> dict[str, str]:
    values = {name: getattr(section, name) for name in names}
    paths = {n: v for n, v in values.items() if v is not None and ":" not in v and v != SHARDS}
    return {name: os.path.abspath(value) for name, value in paths.items()}


def check_changes(run: Run, recipe: Recipe) -> None:
    """Raise `RunDiffersError` for a change that a resumed run may not have."""
    changed = differences(run.recipe, recipe)
    longer = recipe.train.epochs > run.recipe.train.epochs
    allowed = (*MAY_CHANGE, "train.epochs") if longer else MAY_CHANGE
    refused = {
        key: values
        for key, values in changed.items()
        if key not in allowed and key.partition(".")[0] not in PLACES
    }
    if refused:
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in refused.items())
        raise errors.RunDiffersError(
            f"resume may change {', '.join([*MAY_CHANGE, *(f'{name}.*' for name in PLACES)])} and "
            f"a larger train.epochs, not\n{lines}\n"
            "Start a new run instead; init.weights and init.assignments carry over what you want."
        )


def _start(path: Path, show: Show | None, stage: str | None = None) -> Run:
    with hold(path) as token:
        attempt = 1 + sum(e["event"] == "started" for e in Run(path).events())
        run = Run(path, token, attempt)
        if is_finished(run):
            return run
        directory.sweep(path)
        recipe = run.recipe
        run.event("started", pid=os.getpid(), ranks=recipe.train.ranks)
        try:
            _run_here(run, recipe, show or (lambda record: None), stage)
        except BaseException as error:
            run.event("stopped", kind=type(error).__name__, text=str(error) or "interrupted")
            raise
        if stage is None:
            run.event("finished", epochs=recipe.train.epochs)
        else:
            run.event("stopped", kind="Stage", text=f"{stage} was all that was asked for")
    return run


def _run_here(run: Run, recipe: Recipe, show: Show, stage: str | None) -> None:
    alone = recipe.train.ranks == 1 and recipe.clusters_inline
    with collected_signals() as asked:
        try:
            if alone:
                _in_process(run, show, stage, asked)
            else:
                _WorkerGroup(run, recipe, show, stage, asked).run()
        except RequeueWanted:
            if signal.SIGINT in asked:
                raise KeyboardInterrupt from None
            raise


def _in_process(run: Run, show: Show, stage: str | None, asked: list[int]) -> None:
    from deepclust.launch.worker import work
    from deepclust.run.reporting import DirectReport

    role = Role(0, 1, "", stage)
    work(run, role, DirectReport(run, show), lambda: bool(asked))


@contextlib.contextmanager
def collected_signals(earlier: list[int] | None = None) -> Iterator[list[int]]:
    """Collect USR2, TERM and INT instead of dying of them; a second INT interrupts at once.

    They are added to those that came earlier, in the same list.
    """
    asked: list[int] = [] if earlier is None else earlier
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@dataclass
class _Child:
    """A process of the gang, and the end of its pipe that we read."""

    name: str
    process: subprocess.Popen[bytes]
    pipe: int
    log: Path
    rest: bytes = b""
    failure: dict[str, Any] | None = None


class _WorkerGroup:
    """The ranks and the cluster worker of one attempt, watched by the launcher."""

    def __init__(
        self, run: Run, recipe: Recipe, show: Show, stage: str | None, asked: list[int]
    ) -> None:
        self.run_, self.recipe, self.show, self.stage, self.asked = run, recipe, show, stage, asked
        self.children: list[_Child] = []
        self.passed_on = 0

    def run(self) -> None:
        """Start all, watch until the trainers are through, and leave no process behind."""
        with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
            try:
                self._spawn(Path(folder) / "rendezvous")
                self._watch()
            finally:
                self._end()

    def _spawn(self, rendezvous: Path) -> None:
        size = self.recipe.train.ranks
        roles = list(range(size))
        if not self.recipe.clusters_inline:
            roles.append(CLUSTER_WORKER)
        self.children = [self._child(rank, size, rendezvous) for rank in roles]

    def _child(self, rank: int, size: int, rendezvous: Path) -> _Child:
        name = "cluster worker" if rank < 0 else f"rank {rank}"
        log = self.run_.path / "logs" / f"{name.replace(' ', '-')}.out"
        reading, writing = os.pipe()
        command = [
            sys.executable, "-P", "-m", "deepclust.launch.worker", "--run", str(self.run_.path),
            "--token", self.run_.token, "--attempt", str(self.run_.attempt),
            "--rank", str(rank), "--size", str(size), "--rendezvous", str(rendezvous),
            "--parent", str(os.getpid()), "--pipe", str(writing), "--stage", self.stage or "",
        ]  # fmt: skip
        # signals wait until the child can handle them: importing torch takes seconds
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            with open(log, "ab") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, pass_fds=[writing])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writing)
        os.set_blocking(reading, False)
        return _Child(name, process, reading, log)

    def _watch(self) -> None:
        """Until every trainer has ended well; the first that fails ends the gang."""
        trainers = [child for child in self.children if child.name != "cluster worker"]
        with selectors.DefaultSelector() as selector:
            for child in self.children:
                selector.register(child.pipe, selectors.EVENT_READ, child)
            while any(child.process.poll() is None for child in trainers):
                for key, _ in selector.select(timeout=0.2):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                self._pass_signals_on()
                self._raise_for_dead()
        for child in self.children:
            self._read(child)
        self._raise_for_dead()

    def _read(self, child: _Child) -> bool:
        """Take in what a child says; False when it has closed its end."""
        try:
            data = os.read(child.pipe, 1 << 16)
        except BlockingIOError:
            return True
        *lines, child.rest = (child.rest + data).split(b"\n")
        for line in lines:
            self._take(child, json.loads(line))
        return bool(data)

    def _take(self, child: _Child, record: dict[str, Any]) -> None:
        if "failed" in record:
            child.failure = record
        elif "event" in record:
            fields = {key: value for key, value in record.items() if key != "event"}
            self.run_.event(record["event"], **fields)
            self.show(record)
        elif "progress" in record:
            self.show(record)

    def _pass_signals_on(self) -> None:
        for _ in self.asked[self.passed_on :]:
            for child in self.children:
                if child.name != "cluster worker" and child.process.poll() is None:
                    child.process.send_signal(signal.SIGUSR2)
        self.passed_on = len(self.asked)

    def _raise_for_dead(self) -> None:
        codes = [child.process.poll() for child in self.children]
        dead = [c for c, code in zip(self.children, codes, strict=True) if code not in (None, 0)]
        if codes[-1] == 0 and None in codes[:-1] and self.children[-1].name == "cluster worker":
            dead.append(self.children[-1])  # nobody told it to leave
        # ranks that stopped because they were asked to are waited for, not punished
        stopping = {c.process.returncode for c in dead} == {RequeueWanted.exit_code}
        trainers_left = [
            c for c in self.children[: self.recipe.train.ranks] if c.process.poll() is None
        ]
        if not dead or (stopping and trainers_left):
            return
        time.sleep(0.2)  # let the others say why, if they have a better reason
        for child in self.children:
            self._read(child)
        raise _error_of(_culprit(self.children, dead))

    def _end(self) -> None:
        """Kill what still runs: every stage is atomic, so there is nothing to lose."""
        for child in self.children:
            child.process.kill()
            child.process.wait()
            os.close(child.pipe)


def _culprit(children: list[_Child], dead: list[_Child]) -> _Child:
    """Who began it: one that told a reason of its own, else one that was killed.

    The others end too, of the collective that the first one left, or because they were told.
    """
    reasons = [c for c in children if c.failure and c.failure["exit_code"] != 1]
    reasons.sort(key=lambda c: c.failure is not None and c.failure["kind"] == "FollowedError")
    killed = [child for child in dead if (child.process.returncode or 0) < 0]
    return (reasons + killed + dead)[0]


def _error_of(child: _Child) -> DeepclustError:
    """The child's own error where it told one, else what its log ends with."""
    if child.failure and child.failure["exit_code"] != 1:
        return errors.error_of(child.failure["exit_code"], child.failure["failed"])
    tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-15:])
    code = child.process.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    kind = ResourceError if code < 0 else DeepclustError
    return kind(f"{child.name} {how}; the others were stopped. Its log ends with:\n{tail}")
