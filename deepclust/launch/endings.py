"""How an attempt of a worker group ended, and who began it: one pure function for every executor.

A process group cannot lose a member. When one is lost the others end too, of the collective that
it left. So the cause is judged from what is known of all of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from deepclust.errors import DeepclustError, FollowedError, RequeueWanted, error_of
from deepclust.launch.policy import (
    AFTERMATH_S,
    GRACE,
    LOSS_S,
    MAY_PASS,
    UNEXPECTED,
    Policy,
)
from deepclust.launch.role import CLUSTER_WORKER

Record: TypeAlias = dict[str, Any]
Cause: TypeAlias = Literal["death", "node", "preemption", "hang", "start", "error"]


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: well, as asked, by an error that no restart mends, or by a fault."""

    kind: Literal["finished", "stopped", "failed", "fault", "resized"]
    who: str = ""
    cause: Cause = "death"  # of a fault
    text: str = ""
    error: DeepclustError | None = None  # of a failure


@dataclass
class Member:
    """What is known of one process of the group.

    Moments are of `time.monotonic`.
    """

    rank: int
    name: str
    began: float = field(default_factory=time.monotonic)
    answered: float | None = None
    idle_s: float | None = None  # as of then; None until its first sign of life
    result: Record | None = None  # {} when it ended well
    death: str = ""
    cause: Cause = "death"
    reachable: bool = True
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or died."""
        return self.result is not None or bool(self.death)

    @property
    def outcome(self) -> Record:
        """Its result; empty while it works and when it ended well."""
        return self.result or {}

    @property
    def has_stopped(self) -> bool:
        """Whether it ended because it was asked to."""
        return self.outcome.get("kind") == RequeueWanted.__name__

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error, and not because it was asked to."""
        return bool(self.result) and not self.has_stopped

    def update(self, record: Record, now: float) -> None:
        """Update what is known of the member from a record that came at the time `now`.

        Every record counts as an answer of the member, except "death" and "unreachable".
        """
        if "death" in record:
            self.death, self.cause = record["death"], record.get("cause", "death")
        elif "unreachable" in record:
            self.reachable = False
            return
        else:
            self.answered, self.reachable = now, True
            self.idle_s = record.get("idle_s", self.idle_s)
            self.result = record.get("result", self.result)
        if self.is_over and self.ended is None:
            self.ended = now


def classify(
    members: list[Member], now: float, policy: Policy, stop_asked: float | None = None
) -> Ending | None:
    """Return how the attempt has ended, and who began it, or None while it goes on.

    When one member is lost the others end too, of the collective that it left. So an end is
    judged after a short wait, in which the others report: see `culprit` for the order.
    """
    trainers = [m for m in members if m.rank != CLUSTER_WORKER]
    if all(m.result == {} for m in trainers):
        return Ending("finished")
    left = [m for m in members if m not in trainers and m.result == {} and stop_asked is None]
    ended = [m for m in members if m.death or m.has_failed] + left
    if ended:
        settled = any(m.death for m in members) or all(m.is_over for m in trainers)
        patience = AFTERMATH_S if all(m.reachable for m in members) else LOSS_S
        waited = now - min(m.ended for m in ended if m.ended is not None)
        return culprit(members) if settled or waited > patience else None
    if all(m.is_over for m in trainers):
        return Ending("stopped", text=next(m.result["failed"] for m in trainers if m.result))
    if stop_asked is not None and now - stop_asked > policy.stop:
        return Ending("stopped", text=f"it did not stop within {policy.stop:g} s and was killed")
    return hang(members, now, policy)


def culprit(members: list[Member]) -> Ending:
    """Return the ending of a group that has lost a member: who began it.

    The causes rank in this order:
    1. an error of ours that no restart mends
    2. a death
    3. another error of ours, such as a reader that died
    4. an unexpected error, such as a broken connection to the member that left
    5. an error of a member that only followed another
    6. a cluster worker that left before the trainers
    """
    failed = sorted((m for m in members if m.has_failed), key=_blame)
    for member in failed:
        if member.outcome["exit_code"] not in MAY_PASS:
            error = error_of(member.outcome["exit_code"], member.outcome["failed"])
            return Ending("failed", member.name, error=error)
    for member in sorted(members, key=lambda m: not m.death):
        if member.death or not member.reachable:
            text = member.death or "it cannot be reached"
            return Ending("fault", member.name, member.cause, text)
    for member in failed:
        text = f"{member.outcome['kind']}: {member.outcome['failed']}"
        return Ending("fault", member.name, "error", text)
    return Ending("fault", "cluster worker", "error", "it ended before the ranks")


def _blame(member: Member) -> tuple[bool, bool, float]:
    """Return a key that sorts failed members by how likely they are to have begun it."""
    follows = member.outcome["kind"] == FollowedError.__name__
    return follows, member.outcome["exit_code"] == UNEXPECTED, member.ended or 0.0


def hang(members: list[Member], now: float, policy: Policy) -> Ending | None:
    """Return the fault of a process that does not answer, or of ranks that get nowhere.

    A rank may wait long for another one, which then has signs of life, its end among them. So
    ranks hang when none has any, and the one that has been without for longest is named. While a
    member cannot be reached its node may be dead, which a scheduler says after `LOSS_S` at most.
    Until then nobody hangs: the others may wait for that member without a connection to it.
    """
    limits = f"{policy.hang_key}={policy.hang:g}"
    for member in (m for m in members if not m.is_over):
        silent, limit = _silent_s(member, now), policy.hang
        if member.idle_s is None:  # importing torch can keep it from answering
            limit = max(limit, policy.start)
        if not member.reachable:
            limit = max(limit, LOSS_S)
        if silent > limit:
            text = f"no answer for {silent:.0f} s ({limits})"
            return Ending("fault", member.name, "hang", text)
    if not all(m.reachable for m in members):
        return None
    for group in (
        [m for m in members if m.rank != CLUSTER_WORKER],
        [m for m in members if m.rank == CLUSTER_WORKER],
    ):
        idle = {m.name: _idle_s(m, now) for m in group}
        if idle and min(idle.values()) > GRACE * policy.hang and not all(m.is_over for m in group):
            name = max((m.name for m in group if not m.is_over), key=idle.__getitem__)
            text = f"no sign of life for {idle[name]:.0f} s ({limits})"
            return Ending("fault", name, "hang", text)
    return None


def _silent_s(member: Member, now: float) -> float:
    return now - (member.began if member.answered is None else member.answered)


def _idle_s(member: Member, now: float) -> float:
    if member.ended is not None:
        return now - member.ended
    if member.idle_s is None or member.answered is None:
        return 0.0
    return member.idle_s + now - member.answered
