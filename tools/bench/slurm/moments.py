"""When a start of a job came to its moments: from the notes in the run, for the benches here."""

from __future__ import annotations

import itertools
from pathlib import Path

from deepclust.files import read_jsonl
from deepclust.run.directory import Run

MOMENTS = (
    "allocated", "job script", "head", "all here", "Ray is up", "placed", "unit", "clustered",
    "training", "first step",
)  # fmt: skip


def moments(run: Path, name: str, start: int) -> dict[str, float]:
    """Seconds since the epoch; the first step is the first that is logged (`train.log=1`)."""
    records = read_jsonl(run / "slurm" / f"{name}-{start}" / "bring-up.jsonl")
    times = {record["moment"]: record["time"] for record in records}
    life = times["job script"]
    following = [e for e in Run(run).events() if e["time"] > life]
    for moment in ("placed", "unit", "clustered", "training"):
        times |= {e["event"]: e["time"] for e in following[::-1] if e["event"] == moment}
    early = {m: when for m, when in times.items() if when <= times.get("training", when)}
    trained = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    logged = [r["time"] for r in trained if r["time"] > life]
    return early | ({"first step": min(logged)} if logged else {})


def parts(lived: dict[str, float]) -> dict[str, float]:
    """Seconds from each moment to the next that there was."""
    there = [m for m in MOMENTS if m in lived]
    return {b: lived[b] - lived[a] for a, b in itertools.pairwise(there)}
