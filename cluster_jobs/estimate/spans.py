"""Where the seconds of a finished run went, by stage, from its events and metrics.

Every stretch between two records belongs to the stage that the later one reports. So the stages
add up to the whole. The first extraction, or else the first plan, also waits for
readers and libraries. What it takes longer than the others is counted as the start.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from deepclust.run.directory import Run

Record = dict[str, Any]
STAGES = {
    "started": "start", "placed": "start", "loaded": "start", "unit": "extraction",
    "extracted": "extraction", "whitening": "clustering", "features": "clustering",
    "clustered": "clustering", "published": "clustering", "waited": "clustering",
    "training": "training", "train": "training", "checkpoint": "checkpoints",
    "exported": "checkpoints", "finished": "start", "evaluate": "evaluation",
}  # fmt: skip
BESIDE = ("clustered", "published")  # of a cluster worker while ranks train (cluster.overlap)


@dataclass(frozen=True)
class Spans:
    """Seconds by stage, and of each extraction, round and plan; `plans` have steps and seconds."""

    seconds: dict[str, float]
    extractions: list[float]
    rounds: list[float]
    plans: list[tuple[int, float]]


def spans_of(run: Run, began: float | None = None, ended: float | None = None) -> Spans:
    """Return the seconds of a run of one attempt, from the command to its end where given."""
    records = _records(run)
    stamps = [(began or records[0]["time"], "start")]
    first = next(i for i, one in enumerate(records) if one["name"] in ("unit", "training"))
    stamps += [(one["time"], "start") for one in records[:first]]
    stamps += [(one["time"], STAGES[one["name"]]) for one in records[first:]]
    stamps += [] if ended is None else [(ended, "start")]
    seconds: dict[str, float] = {}
    pieces: list[tuple[str, float]] = []
    for (before, _), (now, stage) in itertools.pairwise(stamps):
        seconds[stage] = seconds.get(stage, 0.0) + now - before
        if pieces and pieces[-1][0] == stage:
            pieces[-1] = stage, pieces[-1][1] + now - before
        else:
            pieces.append((stage, now - before))
    of = {name: [took for stage, took in pieces if stage == name] for name in seconds}
    spans = Spans(seconds, of.get("extraction", []), of.get("clustering", []), _plans(records))
    return _without_start(spans)


def _records(run: Run) -> list[Record]:
    """Return the events and the metrics of training, in order of time."""
    events = [{**event, "name": event["event"]} for event in run.events()]
    steps = [{**record, "name": "train"} for record in run.metrics("train")]
    cluster = run.recipe.cluster
    skipped = BESIDE if cluster is not None and cluster.overlap else ()
    scores = [{**record, "name": "evaluate"} for record in run.metrics("evaluate")]
    known = [
        e for e in [*events, *steps, *scores] if e["name"] in STAGES and e["name"] not in skipped
    ]
    return sorted(known, key=lambda record: float(record["time"]))


def _plans(records: list[Record]) -> list[tuple[int, float]]:
    """Return the steps and seconds of each plan."""
    plans: list[tuple[int, float]] = []
    step = 0
    for before, record in itertools.pairwise(records):
        took = record["time"] - before["time"]
        if record["name"] == "training":
            plans.append((0, took))
        elif record["name"] == "train" and plans:
            steps, spent = plans[-1]
            plans[-1] = steps + record["step"] - step, spent + took
            step = record["step"]
    return plans


def _without_start(spans: Spans) -> Spans:
    """Count what the first stage with images takes longer as the start."""
    seconds, extractions, plans = dict(spans.seconds), spans.extractions, spans.plans
    stage, extra = "extraction", 0.0
    if len(extractions) > 1:
        extra = max(0.0, extractions[0] - median(extractions[1:]))
        extractions = [extractions[0] - extra, *extractions[1:]]
    elif not extractions and len(plans) > 1:
        stage, (steps, took) = "training", plans[0]
        extra = max(0.0, took - steps * median(s / max(1, n) for n, s in plans[1:]))
        plans = [(steps, took - extra), *plans[1:]]
    if extra:
        seconds[stage] -= extra
        seconds["start"] = seconds.get("start", 0.0) + extra
    return Spans(seconds, extractions, spans.rounds, plans)


def later(values: list[float]) -> float:
    """Return the mean without the first one, which pays for what comes up; 0 of none."""
    return mean(values[1:] or values) if values else 0.0
