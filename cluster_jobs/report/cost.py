"""What a run took: seconds by stage, from the times of its events, and where it ran.

The time before an event belongs to the stage that the event ends. Between attempts nothing is
counted: the run waited, or nobody had resumed it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from cluster_jobs.terminal import recorded_command
from deepclust.errors import DataError
from deepclust.files import fits, read_record
from deepclust.run.directory import Run

STAGES = {  # the event that ends some work, and what that was; after "training" it is training
    "started": "start", "placed": "start", "loaded": "start", "restored": "start",
    "unit": "extraction", "extracted": "extraction",
    "whitening": "whitening", "features": "whitening",
    "clustered": "clustering", "published": "clustering",
    "checkpoint": "training", "replaced": "training", "exported": "export",
    "waiting": "waiting for machines",
}  # fmt: skip
WAITED = {"whitening": "whitening", "assignments": "clustering"}  # of ranks, by stage


@dataclass(frozen=True)
class Cost:
    """Seconds in all and by stage, the attempts, on which machines, by which command."""

    seconds: float
    stages: list[tuple[str, float]]
    attempts: int
    where: str
    command: str | None


def cost(run: Run) -> Cost | None:
    """Return what the run took so far, or None before its first event."""
    events = run.events()
    if not events:
        return None
    stages = by_stage(events)
    attempts = len({event.get("attempt") for event in events})
    hosts = {m["host"]: None for e in events for m in e.get("members", []) if "host" in m}
    cpus, command = _environment(run)
    where = ", ".join(map(str, hosts)) + (f" ({cpus} cores)" if cpus else "")
    longest_first = sorted(stages.items(), key=lambda one: -one[1])
    return Cost(sum(stages.values()), longest_first, attempts, where.strip(), command)


def by_stage(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each stage."""
    seconds: dict[str, float] = {}
    for before, event in itertools.pairwise(events):
        if event.get("attempt") == before.get("attempt"):
            stage, took = _stage(before, event), max(0.0, event["time"] - before["time"])
            seconds[stage] = seconds.get(stage, 0.0) + took
    return seconds


def _stage(before: dict[str, Any], event: dict[str, Any]) -> str:
    """Return what the time between two events was for."""
    if event["event"] == "waited":
        return WAITED.get(str(event.get("stage")), "other")
    if event["event"] == "checkpoint" and before["event"] in ("started", "placed", "loaded"):
        return "start"
    return STAGES.get(event["event"], "other")


def _environment(run: Run) -> tuple[int | None, str | None]:
    """Return the cores of the first machine, and the command, as env.json has them."""
    path = run.path / "env.json"
    try:
        env = read_record(path, {}) if path.exists() else {}
    except DataError:
        return None, None
    cpus = env.get("cpus")
    return cpus if fits(cpus, int) else None, recorded_command(env.get("command"))
