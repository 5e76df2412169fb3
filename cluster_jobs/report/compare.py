"""Several runs on one page: what differs between their recipes, their scores, and their curves.

Where one number differs, as in a sweep, the scores are drawn against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from cluster_jobs.report.charts import Chart, Curve, curves_chart
from cluster_jobs.report.cost import cost
from cluster_jobs.report.facts import Facts, Record, gather
from deepclust.errors import RecipeError, shown
from deepclust.run.directory import open_run

BY_ROUND = (  # statistics of a round that are compared, and what they are
    ("nmi_labels", "NMI to the labels"),
    ("nmi_previous", "NMI to the previous round"),
    ("entropy_ratio", "Entropy of the sizes / ln k"),
)
IGNORED = ("data.workers",)  # no result depends on it
MOST = 12  # runs on a page


@dataclass(frozen=True)
class Column:
    """A run: its name, facts, the values of keys that differ, and how long it worked."""

    name: str
    facts: Facts
    keys: list[str]
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """The runs, the keys that differ, a row for each score, and the charts."""

    runs: list[Column]
    keys: list[str]
    scores: list[tuple[str, list[float | None]]]
    charts: list[Chart]
    written: str


def compare(run_dirs: Sequence[Path]) -> Comparison:
    """Return what the page shows.

    Raises `RecipeError` for too many runs, or one given twice.
    """
    paths = [path.resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise RecipeError("a run is given twice; compare different runs")
    if len(paths) > MOST:
        raise RecipeError(f"{len(paths)} runs are too many for one page; give at most {MOST}")
    runs = [open_run(path) for path in paths]
    facts = [gather(run) for run in runs]
    flat = [dict(one.recipe.flat()) for one in facts]
    keys = differing(flat)
    took = [cost(run) for run in runs]
    columns = [
        Column(name, one, [_text(values, key) for key in keys], None if c is None else c.seconds)
        for name, one, values, c in zip(_names(paths), facts, flat, took, strict=True)
    ]
    scores = scores_of(facts)
    drawn = [*_swept(keys, flat, scores), *_curves_of(columns)]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return Comparison(columns, keys, scores, drawn, now)


def differing(flat: list[dict[str, object]]) -> list[str]:
    """Return the keys of recipes that do not have one value in all, in the recipe's order."""
    order = dict.fromkeys(key for values in flat for key in values)
    return [
        key
        for key in order
        if not key.startswith(IGNORED) and len({repr(values.get(key)) for values in flat}) > 1
    ]


def scores_of(facts: list[Facts]) -> list[tuple[str, list[float | None]]]:
    """Return each score that a run has: the newest evaluation's, and those of the last round."""
    columns = [dict(_scores(one)) for one in facts]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name) for column in columns]) for name in names]


def _scores(facts: Facts) -> Iterator[tuple[str, float]]:
    """Yield names and numbers, the oldest first, so that a newer one replaces it."""
    last: Record = facts.rounds[-1] if facts.rounds else {}
    for key, name in BY_ROUND:
        if last.get(key) is not None:
            yield f"{name}, last round", last[key]
    for score in reversed(facts.scores):
        yield f"{score.evaluator} {score.measure}", score.value


def _names(paths: list[Path]) -> list[str]:
    """Return short names that differ: folders of the same name have their parent's before it."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{path.parent.name}/{path.name}" for path in paths]


def _text(values: dict[str, object], key: str) -> str:
    return str(shown(values[key], key)) if key in values else "–"


def _swept(
    keys: list[str], flat: list[dict[str, object]], scores: list[tuple[str, list[float | None]]]
) -> list[Chart]:
    """Return each score against the one number that differs beside the seed, or nothing."""
    swept = [key for key in keys if key != "seed"]
    if len(swept) != 1:
        return []
    key = swept[0]
    given = [values.get(key) for values in flat]
    if not all(isinstance(value, (int, float)) for value in given):
        return []
    xs, places = np.unique(np.array(given, np.float64), return_inverse=True)
    wide = bool(xs.min() > 0 and xs.max() >= 8 * xs.min())

    def draw(axes: Axes) -> None:
        axes.set_xscale("log" if wide else "linear")

    seeds = "" if len(xs) == len(flat) else "The mean of the seeds. "
    return [
        curves_chart(
            f"{name}, by {key}", f"{seeds}A point for each {key}.", key,
            [(name, xs, _means(values, places))], draw,
        )
        for name, values in scores
    ]  # fmt: skip


def _means(values: list[float | None], places: np.ndarray) -> np.ndarray:
    """Return the mean of the values of each place, NaN where none is known."""
    known = np.array([np.nan if value is None else value for value in values])
    there = np.isfinite(known)
    counts = np.bincount(places[there], minlength=int(places.max()) + 1)
    sums = np.bincount(places[there], weights=known[there], minlength=len(counts))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _curves_of(columns: list[Column]) -> list[Chart]:
    """Return the loss by epoch, and statistics by round, with a curve for each run."""
    panels = [
        ("Training loss", "epoch", [(c.name, _pairs(c.facts.train, "loss")) for c in columns])
    ]
    panels += [
        (title, "round", [(c.name, _pairs(c.facts.rounds, key)) for c in columns])
        for key, title in BY_ROUND
    ]
    drawn = []
    for title, x, pairs in panels:
        curves: list[Curve] = [(name, xs, ys) for name, (xs, ys) in pairs if len(xs)]
        if curves:
            drawn.append(curves_chart(title, "A curve for each run.", x, curves))
    return drawn


def _pairs(records: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the records that have both."""
    x = "round" if key != "loss" else "epoch"
    rows = [(r[x], r[key]) for r in records if r.get(x) is not None and r.get(key) is not None]
    table = np.array(rows, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
