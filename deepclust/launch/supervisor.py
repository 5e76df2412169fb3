"""The supervisor of a worker group: one loop, one classification and one budget for every executor.

A transport starts the processes and carries their records: pipes on this machine, Ray actors,
sockets of a Slurm job. A process group cannot lose a member, so one fault ends the attempt. The
next one begins from the last commit, under a new token that fences off what is left of the old.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from deepclust.errors import RequeueWanted
from deepclust.launch.alarms import Alarms
from deepclust.launch.endings import Ending, Member, Record, classify
from deepclust.launch.policy import Budget, Policy, progress_on_disk
from deepclust.launch.role import Role
from deepclust.launch.tracking import require_trackers, tracked
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import renew

Show: TypeAlias = Callable[[Record], None]
POLL_S = 0.2
log = logging.getLogger("deepclust.launch")


class Transport(Protocol):
    """How a supervisor reaches the processes of one attempt."""

    def start(self, roles: list[Role]) -> list[Record]:
        """Start a process for every role and return where each is, or raise `AttemptEnded`."""

    def poll(self, timeout: float) -> list[tuple[int, Record]]:
        """Return what came within `timeout` seconds, each record with the rank that it is from.

        Records: `event` and `progress` of a `Report`, `idle_s` (an answer), `result` ({} or
        {failed, kind, exit_code}), `death` (a text, and perhaps its `cause`), `unreachable`.
        """

    def stop(self) -> None:
        """Ask the trainers to stop at their next step."""

    def kill(self) -> None:
        """End every process.

        Each stage is atomic, so nothing is lost.
        """


class AttemptEnded(Exception):
    """The attempt ended before all of its processes were up."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.text)
        self.ending = ending


def attempts_of(run: Run) -> int:
    """Return how many attempts the run has begun."""
    return sum(event["event"] == "started" for event in run.events())


@dataclass
class Supervisor:
    """The holder of a run, who begins attempts until the run is finished."""

    run: Run
    policy: Policy
    asked: Callable[[], bool]  # whether we are asked to stop
    show: Show = lambda record: None
    alarms: Alarms = field(init=False)

    def __post_init__(self) -> None:
        self.alarms = Alarms(lambda: self.run)

    def control(self, attempt: Callable[[], Ending]) -> None:
        """Make attempts until one finishes the run.

        Raises the error that no restart mends, `RequeueWanted` when asked to stop, and
        `ResourceError` when the budget of faults is spent.
        """
        budget = Budget(self.policy)
        while True:
            before = progress_on_disk(self.run)
            ending = attempt()
            if ending.kind == "finished":
                return
            if ending.error is not None:
                raise ending.error
            if ending.kind == "stopped":
                raise RequeueWanted(ending.text)
            if ending.kind == "fault":
                self.event("fault", who=ending.who, cause=ending.cause, text=ending.text)
                if self.asked():
                    raise RequeueWanted(f"asked to stop while {ending.who} was lost")
                last = f"{ending.who}, {ending.cause}: {ending.text}"
                budget.spend(ending.cause, last, progress_on_disk(self.run) != before)

    def begin(self, ranks: int, **facts: Any) -> None:
        """Fence off and clean up what is left of the last attempt, and begin one of `ranks`."""
        run_dir, recipe = self.run.path, self.run.recipe
        token = renew(run_dir, self.run.token)
        directory.sweep(run_dir)
        if recipe.train.ranks != ranks:
            recipe.replace(f"train.ranks={ranks}").save(run_dir / "recipe.yaml")
        # a new Run, which reads the recipe again
        self.run = replace(self.run, token=token, attempt=attempts_of(self.run) + 1)
        self.event("started", pid=os.getpid(), ranks=ranks, **facts)

    def watch(
        self, transport: Transport, roles: list[Role], stopping: Callable[[], bool] | None = None
    ) -> Ending:
        """Run one attempt on a transport and leave none of its processes behind.

        `stopping`: whether this attempt is asked to stop. The supervisor's `asked` by default.
        """
        try:
            self.event("placed", members=transport.start(roles))
            members = {role.rank: Member(role.rank, role.name) for role in roles}
            return self._watch(transport, members, stopping or self.asked)
        except AttemptEnded as early:
            return early.ending
        finally:
            transport.kill()

    def _watch(
        self, transport: Transport, members: dict[int, Member], stopping: Callable[[], bool]
    ) -> Ending:
        stop_asked: float | None = None
        while True:
            for rank, record in transport.poll(POLL_S):
                members[rank].update(record, time.monotonic())
                self._publish(record)
            if stop_asked is None and stopping():
                transport.stop()
                stop_asked = time.monotonic()
            now = time.monotonic()
            if ending := classify(list(members.values()), now, self.policy, stop_asked):
                return ending

    def _publish(self, record: Record) -> None:
        if "event" in record:
            fields = {key: value for key, value in record.items() if key != "event"}
            self.event(record["event"], **fields)
        elif "progress" in record:
            self.show(record)

    def event(self, name: str, **fields: Any) -> None:
        """Write an event, then log it and show it."""
        self.run.event(name, **fields)
        log.info("%s %s", name, fields)
        self.tell({"event": name, **fields})

    def tell(self, record: Record) -> None:
        """Show a record, and raise an alarm where `notify` asks for one."""
        self.alarms.see(record)
        self.show(record)

    @contextlib.contextmanager
    def recorded(self, stage: str | None = None) -> Iterator[None]:
        """Write how the block ended: `finished`, or `stopped` with the error or the only stage.

        The trackers of the run are fed meanwhile.
        """
        try:
            with tracked(self.run, self.warn), self._ending_recorded(stage):
                yield
        finally:
            self.alarms.settle()

    @contextlib.contextmanager
    def _ending_recorded(self, stage: str | None) -> Iterator[None]:
        try:
            require_trackers(self.run.recipe.track)
            yield
        except BaseException as error:
            self.event("stopped", kind=type(error).__name__, text=str(error) or "interrupted")
            raise
        if stage is None:
            self.event("finished", epochs=self.run.recipe.train.epochs)
        else:
            self.event("stopped", kind="Stage", text=f"only the stage {stage} was requested")

    def warn(self, text: str) -> None:
        """Show and log a warning of another thread, which stays out of the events."""
        log.warning("%s", text)
        self.show({"event": "warning", "text": text})
