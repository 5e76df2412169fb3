"""What became of a gang, from what is known of its members: who began it, and what kind of fault.

When one member is lost the others end too, of the collective that it left. The one to name is the
first in this order: an error of ours that no other try mends; a death, with its node if that is
gone; what else was told, but not by those who only followed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import ray

from cluster_jobs.ray.actor import Place
from deepclust.errors import (
    DeepclustError,
    FollowedError,
    RequeueWanted,
    error_of,
)
from deepclust.launch.policy import AFTERMATH_S, MAY_PASS
from deepclust.launch.role import CLUSTER_WORKER

GRACE = 1.5  # a hang stops the others too; who does not even answer is named first
ALONE = "worker process has died"  # how Ray tells the death of a process whose node lives
Cause: TypeAlias = Literal["death", "node", "preemption", "hang", "start", "error"]
Result: TypeAlias = dict[str, Any]  # of a member's work: {} or failed, kind, exit_code


@dataclass(frozen=True)
class Ending:
    """How a life of the gang ended."""

    kind: Literal["finished", "stopped", "failed", "fault"]
    who: str = ""
    cause: Cause = "death"  # of a fault
    text: str = ""
    error: DeepclustError | None = None  # of a failure, which no restart would mend


@dataclass
class Seated:
    """A member, what it was asked, and what is known of it."""

    name: str
    rank: int
    actor: Any
    place: Place | None = None
    question: Any = None  # its next news
    have: int = 0  # records of it that were taken in
    result: Result | None = None
    death: str = ""
    unreachable: bool = False
    answered: float = field(default_factory=time.monotonic)
    idle_s: float | None = None  # as of then; None until its rank could stop for the first time

    @property
    def over(self) -> bool:
        """Whether it has ended, or died."""
        return self.result is not None or bool(self.death)


def is_bad(result: Result | None) -> bool:
    """Whether it ended with an error, and not because it was asked to stop."""
    return bool(result) and (result or {})["kind"] != RequeueWanted.__name__


def all_stopped(trainers: list[Seated]) -> bool:
    """Whether all have stopped as asked."""
    return all((m.result or {}).get("kind") == RequeueWanted.__name__ for m in trainers)


def worker_left(members: list[Seated]) -> bool:
    """Nobody tells the cluster worker to leave before the trainers do."""
    return any(m.rank == CLUSTER_WORKER and m.result == {} for m in members)


def why(members: list[Seated]) -> Ending:
    """Of a gang that has lost a member, or heard an error: who began it."""
    told = [(m.name, m.result or {}) for m in members if is_bad(m.result)]
    for name, result in told:
        if result["exit_code"] not in MAY_PASS:
            return Ending("failed", name, error=error_of(result["exit_code"], result["failed"]))
    for member in sorted(members, key=lambda m: not m.death):
        if member.death or member.unreachable:
            return _lost(member)
    told.sort(key=lambda one: one[1]["kind"] == FollowedError.__name__)
    if not told:
        return Ending("fault", "cluster worker", "error", "it left before the trainers")
    return Ending("fault", told[0][0], "error", str(told[0][1]["failed"]))


def hang(members: list[Seated], limit: float) -> Ending | None:
    """Who has not answered for `limit` seconds; else a rank that answers and gets nowhere."""
    now = time.monotonic()
    for member in (m for m in members if not m.over):
        if (silence := now - member.answered) > limit:
            return Ending("fault", member.name, "hang", f"no answer for {silence:.0f} s")
    for member in (m for m in members if not m.over and m.rank != CLUSTER_WORKER):
        idle = 0.0 if member.idle_s is None else member.idle_s + now - member.answered
        if idle > GRACE * limit:
            text = f"no step for {idle:.0f} s; ray.hang={limit:g}"
            return Ending("fault", member.name, "hang", text)
    return None


def first_line(error: Exception) -> str:
    """Of Ray's long messages the line that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    dead = [line for line in lines if "dead because" in line or "died" in line]
    return (dead or lines or [type(error).__name__])[-1][:300]


def _lost(member: Seated) -> Ending:
    """A dead member: it alone, or its node, or its node taken away on purpose."""
    node = member.place.node if member.place and ALONE not in member.death else ""
    facts = next((n for n in _nodes_soon(node) if n["NodeID"] == node), None)
    if facts is None or facts["Alive"]:
        return Ending("fault", member.name, "death", member.death or "it cannot be reached")
    reason = f"{facts.get('DeathReason', '')} {facts.get('DeathReasonMessage', '')}".strip()
    cause: Cause = "preemption" if "PREEMPT" in reason.upper() else "node"
    host = member.place.host if member.place else "?"
    return Ending("fault", member.name, cause, f"node {node[:8]} on {host} is gone ({reason})")


def _nodes_soon(node: str) -> list[dict[str, Any]]:
    """The cluster's nodes; a dead process is told a moment before its dead node is."""
    deadline = time.monotonic() + AFTERMATH_S
    nodes: list[dict[str, Any]] = []
    while node and time.monotonic() < deadline:
        nodes = list(ray.nodes())
        if any(n["NodeID"] == node and not n["Alive"] for n in nodes):
            break
        time.sleep(0.1)
    return nodes
