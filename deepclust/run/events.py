"""The events of a run: every name in events.jsonl, and the fields that its record has.

Each record also has `time` (seconds since 1970), `attempt` (from 1; `incarnation` in runs of
earlier versions) and `event`, its name. Writers and readers share this table, and the names and
fields of runs on disk never change their meaning.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from deepclust.files import fits

EventName: TypeAlias = Literal[
    "started",  # a worker group begins an attempt
    "placed",  # its members are on their machines
    "waiting",  # for room in the cluster
    "growing",  # room for more ranks: a larger group takes over
    "fault",  # a member failed, and the group starts again
    "loaded",  # the start weights of a new run
    "restored",  # training goes on from a checkpoint
    "unit",  # a chunk of an extraction is on disk
    "extracted",  # all chunks are
    "whitening",  # it is solved
    "features",  # the whitened rows are on disk
    "clustered",  # a round's assignments are on disk, with their statistics
    "published",  # how long the parts of the clustering took
    "waited",  # how long the ranks waited for a stage
    "training",  # a segment of training begins
    "replaced",  # unreadable samples had others in their place
    "checkpoint",  # a step is saved
    "evaluated",  # a step is scored by kNN; `best` is the step of the best score so far
    "warning",
    "exported",  # the backbone is written
    "finished",
    "stopped",  # an attempt ended before the run was finished
    "notified",  # an alarm was sent, or why not; it may come after the run's end
]
Number = (int, float)
SECONDS = dict.fromkeys(("prepare", "read", "cluster", "write"), Number)
FIELDS: dict[EventName, dict[str, Any]] = {
    "started": {"pid": int, "ranks": int, "job": str},
    "placed": {"members": list},
    "waiting": {"text": str},
    "growing": {"text": str},
    "fault": {"who": str, "cause": str, "text": str},
    "loaded": {"text": str},
    "restored": {"step": int, "segment": int, "round": int},
    "unit": {"round": int, "unit": int, "of": int},
    "extracted": {"round": int, "units": int, "excluded": int},
    "whitening": {"round": int, "rank": int, "seconds": Number},
    "features": {"round": int},
    "clustered": {"round": int, "k": int, "n": int, "empty": int},
    "published": {"round": int, **SECONDS},
    "waited": {"round": int, "stage": str, "seconds": Number},
    "training": {"round": int, "segment": int, "step": int, "steps": int, "rounds_left": int},
    "replaced": {"step": int, "count": int, "first": list},
    "checkpoint": {"step": int},
    "evaluated": {"step": int, "epoch": Number, "round": int, "top1": Number, "best": int},
    "warning": {"text": str, "about": str},
    "exported": {"file": str, "hash": str},
    "finished": {"epochs": int},
    "stopped": {"kind": str, "text": str},
    "notified": {"incident": str, "by": str, "sent": bool, "text": str},
}
OPEN: set[EventName] = {"clustered"}  # all of statistics.json are fields of it
# of Slurm alone; of later versions; of a collapse; of later versions
OPTIONAL = {
    ("started", "job"), ("exported", "hash"), ("warning", "about"), ("training", "steps"),
    ("training", "rounds_left"),
}  # fmt: skip
NAMES: tuple[EventName, ...] = get_args(EventName)
NUMBERS: dict[str, dict[str, Any]] = {  # of metrics.jsonl, what a record of a kind has at least
    "train": {"step": int, "round": int, "loss": Number},
    "round": {"step": int},
    "evaluate": {"step": int, "top1": Number, "best": int},
}
SHOWN = ("reassigned", "nmi_labels")  # of a round, where it has them
OR_NULL = (*Number, None)
WANTED: dict[str, list[tuple[str, Any, bool]]] = {
    # of an event by its name: each field, its type, and whether it may be missing
    str(name): [
        *((key, kind, (name, key) in OPTIONAL) for key, kind in fields.items() if key not in SHOWN),
        *((key, OR_NULL, True) for key in SHOWN),
    ]
    for name, fields in (*FIELDS.items(), ("", dict[str, Any]()))
}


def is_event(record: dict[str, Any]) -> bool:
    """Return whether a line of events.jsonl has the fields of its event, each of its type.

    An event of a later version, which is not in the table, needs a name and a time.
    """
    name = record.get("event")
    if not (isinstance(name, str) and fits(record.get("time"), Number)):
        return False
    return all(
        fits(record[key], kind) if key in record else optional
        for key, kind, optional in WANTED.get(name, WANTED[""])
    )


def is_metric(record: dict[str, Any]) -> bool:
    """Return whether a line of metrics.jsonl has what its kind has at least."""
    kind = record.get("kind")
    if not isinstance(kind, str):
        return False
    known = {"step": int, **NUMBERS.get(kind, {})}
    if not all(fits(record.get(key), wanted) for key, wanted in known.items()):
        return False
    attempt = record.get("attempt", record.get("incarnation", 0))  # the name in older runs
    numbers = [v for k, v in record.items() if k != "kind"] if kind == "train" else []
    return fits(attempt, int) and all(fits(value, OR_NULL) for value in numbers)
