"""One line on what a run takes, for its start and for a dry run: nothing is measured for it.

Steps and rounds are counted from the recipe and an index that is there. Seconds come from a
calibration of the same work on this machine, if `deepclust estimate` has made one.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from cluster_jobs.estimate.counts import count
from cluster_jobs.estimate.kept import kept
from cluster_jobs.estimate.speeds import seconds
from cluster_jobs.terminal import duration
from deepclust.errors import DeepclustError, argument
from deepclust.recipe import Recipe
from deepclust.stages.data_index import open_data_index


def line(
    recipe: Recipe, source: str, overrides: Sequence[str], on: str, run_dir: Path | None = None
) -> str:
    """Return the line; `source` and `overrides` are how the user has named the recipe."""
    how = f"deepclust estimate {shlex.join(map(argument, [source, *overrides]))}"
    how += "" if on == "local" else f" --on {on} --device h100"
    try:
        index = open_data_index(recipe.data, run_dir, build=False)
        counts = count(recipe, len(index) - len(index.excluded))
    except DeepclustError:  # the run itself says what is wrong with the data
        return f"estimate: no index of data.shards yet; with one, {how}"
    work = f"estimate: {counts.samples:,} images, {counts.steps:,} steps"
    work += f", {counts.rounds:,} rounds" if counts.rounds else ""
    known = kept(recipe) if on == "local" else None
    if known is None:
        return f"{work}; time, memory and disk: {how}"
    speeds, measured = known
    took = duration(sum(seconds(recipe, counts, speeds).values()))
    held = "" if speeds.memory is None else f" and {speeds.memory / 1e9:.1f} GB of memory"
    day = time.strftime("%Y-%m-%d", time.localtime(measured))
    return f"{work}, about {took}{held}, as measured here on {day}"
