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
from deepclust.run.directory import Run
from deepclust.run.round_files import read_assignments

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#c8701c", "#2b8a6b", "#8a94a3"
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


@dataclass(frozen=True)
class Chart:
    """A panel: what it shows, how to read it, and its SVG."""

    title: str
    reading: str
    svg: Markup


def charts(run: Run, facts: Facts) -> list[Chart]:
    """Return the panels that there are numbers for."""
    seeded = facts.recipe.seeds is not None
    panels = [_loss(facts), _answers(facts), *_by_round(facts.rounds, seeded), _sizes(run, facts)]
    return [panel for panel in panels if panel is not None]


def _loss(facts: Facts) -> Chart | None:
    if not facts.train:
        return None
    steps, losses = (_column(facts.train, name) for name in ("step", "loss"))
    guess = facts.guess

    def draw(axes: Axes) -> None:
        axes.plot(_thin(steps), _thin(losses), color=BLUE, label="loss")
        axes.axhline(guess, color=GREY, linestyle="--", linewidth=1.2, label="a guess")
        axes.set_xlabel("step")
        _legend(axes)

    reading = "It should fall well below the dashed line."
    if (refresh := facts.recipe.method.round) is not None and refresh.resets:
        reading = "It falls within a round, and jumps at each new one, because the head is new."
    return Chart("Training loss", reading, _svg(draw))


def _answers(facts: Facts) -> Chart | None:
    """Return the panel of the signs of collapse, where the method tells them."""
    known = [(key, name) for key, name in ANSWERS if any(key in line for line in facts.train)]
    if not known:
        return None
    steps = _column(facts.train, "step")

    def draw(axes: Axes) -> None:
        for (key, name), colour in zip(known, (BLUE, ORANGE, GREEN, GREY), strict=False):
            axes.plot(_thin(steps), _thin(_column(facts.train, key)), color=colour, label=name)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("step")
        _legend(axes)

    reading = "A collapse is a spread near 0, or an entropy of the mean target near 0"
    reading += ", or a mean entropy that stays at 1. Entropies are shares of ln k."
    return Chart("Signs of collapse", reading, _svg(draw))


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
        axes.plot(sure, right, marker="o", color=BLUE, label="right")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("confidence")
        _legend(axes)

    reading = "Share of right answers by confidence: below the dashed line they are too sure."
    return Chart("Calibration", reading, _svg(draw))


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

    def draw(axes: Axes) -> None:
        for (key, name), colour in zip(known, (BLUE, ORANGE, GREEN), strict=False):
            axes.plot(numbers, _column(rounds, key), marker="o", color=colour, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        if shares:
            axes.set_ylim(-0.02, 1.02)
        if len(known) > 1:
            _legend(axes)

    return Chart(title, reading, _svg(draw))


def _sizes(run: Run, facts: Facts) -> Chart | None:
    if not facts.rounds:
        return None
    number, k = facts.rounds[-1]["round"], facts.recipe.clustering.k
    assignments = read_assignments(run, number)[0]
    sizes = np.bincount(assignments[assignments >= 0], minlength=k)
    wide = sizes.max() > 20 * max(1, np.median(sizes))

    def draw(axes: Axes) -> None:
        axes.hist(sizes, bin_edges(sizes, wide).tolist(), color=BLUE, alpha=0.85)
        axes.axvline(sizes.mean(), color=ORANGE, linestyle="--", linewidth=1.2, label="even share")
        axes.set_xscale("log" if wide else "linear")
        axes.set_xlabel("images in a cluster")
        axes.set_ylabel("clusters")
        _legend(axes)

    head = ", head 0" if facts.heads else ""
    reading = (
        f"Of round {number}{head}: {sizes.min():,} to {sizes.max():,} images in each of {k:,}."
    )
    return Chart("Cluster sizes", reading, _svg(draw))


def _legend(axes: Axes) -> None:
    """Draw the legend as one line above the panel, where it hides no curve."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, borderpad=0, columnspacing=1)


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


def _thin(values: np.ndarray) -> np.ndarray:
    parts = np.array_split(values, min(len(values), MOST_POINTS))
    return np.array([part.mean() for part in parts])


def _svg(draw: Callable[[Axes], None]) -> Markup:
    """Draw on a fresh figure (no pyplot, no global state) and return its <svg> element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.7, 2.5), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])
