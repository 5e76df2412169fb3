"""The curves of the report, as SVG text for the page: small panels that print well."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cluster_jobs.report.facts import Answered, Facts, Record
from cluster_jobs.results.by_cluster import before_of, drift
from deepclust.run.directory import Run
from deepclust.run.round_files import read_assignments

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#c8701c", "#2b8a6b", "#8a94a3"
COLOURS = (BLUE, ORANGE, GREEN, "#8d4a9e", "#b0343c", "#5d6b2f", "#1d8ca3", GREY)
STYLE: Any = {  # Any: matplotlib types the keys one by one, in new versions only
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "deepclust",  # the same run gives the same bytes
    "font.size": 10.5,
    "axes.edgecolor": "#c9d0d9",
    "axes.labelcolor": "#4a5565",
    "text.color": "#6b7686",  # of legends, on light and on dark paper
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f3",
    "xtick.color": "#4a5565",
    "ytick.color": "#4a5565",
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
}
ANSWERS = (  # scalars of the metrics that tell of a collapse, and their short names
    ("spread", "spread"),
    ("entropy_of_mean", "of the mean"),
    ("mean_entropy", "mean entropy"),
    ("prototypes_used", "used"),
)
MOST_POINTS = 600  # of a curve; more are averaged in runs of equal length
MOST_ROWS = 30  # of the table of a curve
MOST_DRIFTS = 40  # rounds, each of which is compared with the one before

Curve = tuple[str, np.ndarray, np.ndarray]  # name, x [n], y [n]


@dataclass(frozen=True)
class Chart:
    """A panel: what it shows, how to read it, its SVG, and the same numbers as a table."""

    title: str
    reading: str
    svg: Markup
    columns: list[str]
    rows: list[list[str]]


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Return the panels that there are numbers for."""
    seeded = facts.recipe.seeds is not None and not facts.recipe.seeds_judge
    panels = [
        _loss(facts),
        _evaluated(facts),
        _answers(facts),
        *_by_round(facts.rounds, seeded),
        *(_labels(facts.seeds) if facts.seeds else ()),
        _drift(run, facts),
        _sizes(run, facts),
    ]
    return [panel for panel in panels if panel is not None]


def _loss(facts: Facts) -> Chart | None:
    if not facts.train:
        return None
    steps, losses = (_column(facts.train, name) for name in ("step", "loss"))

    def line(axes: Axes) -> None:
        axes.axhline(facts.guess, color=GREY, linestyle="--", linewidth=1.2, label="a guess")

    reading = "It should fall well below the dashed line."
    if (refresh := facts.recipe.method.round) is not None and refresh.resets:
        reading = "It falls within a round, and jumps at each new one, because the head is new."
    return curves_chart("Training loss", reading, "step", [("loss", steps, losses)], line)


def _evaluated(facts: Facts) -> Chart | None:
    """Return the panel of kNN during training, with the best step, where it was measured."""
    if not facts.evaluated:
        return None
    steps, top1 = (_column(facts.evaluated, name) for name in ("step", "top1"))
    best = int(facts.evaluated[-1]["best"])

    def draw(axes: Axes) -> None:
        axes.axvline(best, color=ORANGE, linestyle="--", linewidth=1.2, label="best")
        _as_shares(axes)

    reading = f"Top-1 of 20-NN on labelled images. The checkpoint of step {best} is kept in best/."
    return curves_chart("kNN during training", reading, "step", [("kNN", steps, top1)], draw)


def _answers(facts: Facts) -> Chart | None:
    """Return the panel of the signs of collapse, where the method tells them."""
    known = [(key, name) for key, name in ANSWERS if any(key in line for line in facts.train)]
    if not known:
        return None
    steps = _column(facts.train, "step")
    curves = [(name, steps, _column(facts.train, key)) for key, name in known]
    reading = "A collapse is a spread near 0, or an entropy of the mean target near 0"
    reading += ", or a mean entropy that stays at 1. Entropies are shares of ln k."
    return curves_chart("Signs of collapse", reading, "step", curves, _as_shares)


def reliability(answered: Answered | None) -> Chart | None:
    """Return the panel of how often answers are right that are so confident."""
    if answered is None or not {"confidence", "accuracy"} <= {*answered.calibration["columns"]}:
        return None
    table = answered.calibration
    sure, right = (
        np.array([row[table["columns"].index(name)] for row in table["values"]], np.float64)
        for name in ("confidence", "accuracy")
    )

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
        axes.set_xlim(-0.02, 1.02)
        _as_shares(axes)

    reading = "Share of right answers by confidence: below the dashed line they are too sure."
    return curves_chart("Calibration", reading, "confidence", [("right", sure, right)], draw)


def _by_round(rounds: list[Record], seeded: bool) -> list[Chart | None]:
    part = "Labels only measure."
    if seeded:
        part = "Labels seed the clusters, so this measure is not independent."
    return [
        _lines(
            rounds,
            "Agreement with the labels",
            f"{part} Accuracy is low by nature when k exceeds the classes.",
            [("nmi_labels", "NMI"), ("ari_labels", "ARI"), ("accuracy_labels", "accuracy")],
        ),
        _lines(
            rounds,
            "Agreement with the previous round",
            "NMI should rise and the reassigned share fall as the clusters settle.",
            [("nmi_previous", "NMI"), ("reassigned", "reassigned")],
        ),
        _lines(
            rounds,
            "Balance",
            "Entropy of the sizes as a share of ln k: 1 is even, a fall is a collapse.",
            [("entropy_ratio", "entropy"), ("largest_share", "largest share")],
        ),
        _lines(
            rounds,
            "Inertia",
            "Mean squared distance of features to their centroid. By Sinkhorn: mean -log p.",
            [("inertia", "inertia")],
            shares=False,
        ),
    ]


def _labels(seeds: Record) -> list[Chart | None]:
    """Return the panel of what the labels did, round by round."""
    reading = "Of held-out images. Nearest: to a prototype of their class. Free: of other classes."
    series = [("accuracy", "nearest"), ("purity", "purity"), ("recall", "recall"), ("free", "free")]
    return [_lines(seeds["rounds"], "What the labels did", reading, series)]


def _drift(run: Run, facts: Facts) -> Chart | None:
    """Return the panel of how far clusters moved between rounds: quartiles over the clusters."""
    numbers, quartiles = [], []
    rounds = [record["round"] for record in facts.rounds][1:]
    chosen = np.unique(np.linspace(0, len(rounds) - 1, MOST_DRIFTS).round().astype(int))
    for number in (rounds[i] for i in chosen if rounds):
        moved = drift(
            before_of(run, number), read_assignments(run, number)[0], facts.recipe.clustering.k
        )
        if np.isfinite(moved).any():
            numbers.append(number)
            quartiles.append(np.nanquantile(moved, [0.25, 0.5, 0.75]))
    if not numbers:
        return None
    xs, table = np.array(numbers, np.float64), np.array(quartiles)
    names = ("a quarter", "half", "three quarters")
    curves: list[Curve] = [(name, xs, table[:, i]) for i, name in enumerate(names)]
    reading = "Share of a cluster's images that were not together a round before: at most this."
    return curves_chart("Drift of the clusters", reading, "round", curves, _as_shares)


def _lines(
    rounds: list[Record],
    title: str,
    reading: str,
    series: Sequence[tuple[str, str]],
    shares: bool = True,
) -> Chart | None:
    """Return a panel of statistics by round, of those that any round has.

    `shares` are 0 to 1.
    """
    known = [(key, name) for key, name in series if any(r.get(key) is not None for r in rounds)]
    if not known:
        return None
    numbers = _column(rounds, "round")
    curves = [(name, numbers, _column(rounds, key)) for key, name in known]
    return curves_chart(title, reading, "round", curves, _as_shares if shares else None)


def curves_chart(
    title: str,
    reading: str,
    x: str,
    curves: list[Curve],
    more: Callable[[Axes], None] | None = None,
) -> Chart:
    """Return a panel of curves over `x`, points where they are few; `more` draws what else."""
    curves = [(name, _thin(xs), _thin(ys)) for name, xs, ys in curves]

    def draw(axes: Axes) -> None:
        for i, (name, xs, ys) in enumerate(curves):
            again, colour = divmod(i, len(COLOURS))  # dashed where colours are used again
            axes.plot(
                xs, ys, "--" if again else "-", marker="o" if len(xs) <= 40 else "",
                color=COLOURS[colour], label=name,
            )  # fmt: skip
        _ticks(axes, np.concatenate([xs[np.isfinite(ys)] for _, xs, ys in curves]))
        axes.set_xlabel(x)
        if more is not None:
            more(axes)
        if len(axes.get_lines()) > 1:
            _legend(axes)

    return Chart(title, reading, svg(draw), *_table(x, curves))


def _table(x: str, curves: list[Curve]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table of curves: by curve where their x differ."""
    _, first, _ = curves[0]
    if all(np.array_equal(first, xs) for _, xs, _ in curves):
        columns = [_thin(values, MOST_ROWS) for values in (first, *(ys for _, _, ys in curves))]
        rows = [[_shown(value) for value in row] for row in zip(*columns, strict=True)]
        return [x, *(name for name, _, _ in curves)], rows
    short = ((name, _thin(xs, MOST_ROWS), _thin(ys, MOST_ROWS)) for name, xs, ys in curves)
    rows = [
        [name, _shown(a), _shown(b)] for name, xs, ys in short for a, b in zip(xs, ys, strict=True)
    ]
    return ["", x, "value"], rows


def _shown(value: float) -> str:
    """Return a number of a table with four digits, or a dash for NaN."""
    return "–" if np.isnan(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _ticks(axes: Axes, xs: np.ndarray) -> None:
    """Mark whole numbers alone on an axis of steps or rounds, and one place as just that."""
    if len(np.unique(xs)) == 1:
        axes.set_xticks([float(xs[0])], [f"{xs[0]:g}"])
    elif len(xs) and np.array_equal(xs, np.round(xs)):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _as_shares(axes: Axes) -> None:
    """Let the axis go from 0 to 1."""
    axes.set_ylim(-0.02, 1.02)


def _sizes(run: Run, facts: Facts) -> Chart | None:
    if not facts.rounds:
        return None
    number, k = facts.rounds[-1]["round"], facts.recipe.clustering.k
    assignments = read_assignments(run, number)[0]
    sizes = np.bincount(assignments[assignments >= 0], minlength=k)
    wide = sizes.max() > 20 * max(1, np.median(sizes))

    edges = bin_edges(sizes, wide)

    def draw(axes: Axes) -> None:
        axes.hist(sizes, edges.tolist(), color=BLUE, alpha=0.85)
        axes.axvline(sizes.mean(), color=ORANGE, linestyle="--", linewidth=1.2, label="even share")
        axes.set_xscale("log" if wide else "linear")
        axes.set_xlabel("images in a cluster")
        axes.set_ylabel("clusters")
        _legend(axes)

    head = ", head 0" if facts.heads else ""
    reading = (
        f"Of round {number}{head}: {sizes.min():,} to {sizes.max():,} images in each of {k:,}."
    )
    counts, _ = np.histogram(sizes, edges)
    rows = [
        [f"{np.ceil(low):,.0f} to {np.ceil(high) - 1:,.0f}", f"{count:,}"]
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    return Chart("Cluster sizes", reading, svg(draw), ["images in a cluster", "clusters"], rows)


def _legend(axes: Axes) -> None:
    """Draw the legend as one line above the panel, where it hides no curve."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, borderpad=0, columnspacing=1)


def bin_edges(sizes: np.ndarray, wide: bool) -> np.ndarray:
    """Return some 32 bins: of equal ratio when a few clusters are huge, else of equal width."""
    low, high = int(sizes.min()), int(sizes.max()) + 1
    if wide:
        return np.geomspace(max(1, low), high, 33)
    width = max(1, -(-(high - low) // 32))
    return np.arange(low, high + width, width) - 0.5


def _column(records: list[Record], key: str) -> np.ndarray:
    """Return a column of numbers, NaN where a record lacks it, which leaves a gap."""
    return np.array([r.get(key) for r in records], dtype=np.float64)


def _thin(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Return at most so many values: means of runs of equal length."""
    parts = np.array_split(values, min(len(values), most))
    return np.array([part.mean() for part in parts])


def svg(draw: Callable[[Axes], None]) -> Markup:
    """Draw on a fresh figure (no pyplot, no global state) and return its <svg> element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.7, 2.5), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=160, transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    return Markup(drawn[drawn.index("<svg") :])
