"""What a run in the foreground shows: a live bar on a terminal, plain lines elsewhere.

Everything goes to stderr. Stdout is for results.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cluster_jobs.pace import Pace
from cluster_jobs.status import Status
from cluster_jobs.terminal import duration, visible
from deepclust.run.scores import flat_scores

PLAIN_EVERY_S = 10.0
ROUND_COLUMNS = {
    "round": "{:d}",
    "inertia": "{:.4f}",
    "entropy_ratio": "{:.3f}",
    "largest_share": "{:.2%}",
    "reassigned": "{:.2f}",
    "nmi_previous": "{:.3f}",
    "nmi_labels": "{:.3f}",
    "accuracy_labels": "{:.3f}",
    "seconds": "{:.1f}",
}
STAGE_FACTS = {  # of a progress record, in this order
    "loss": "loss {:.3f}",
    "images_per_s": "{:,.0f} images/s",
    "waiting": "waiting for data {:.0%}",
    "inertia": "inertia {:.5g}",
    "moved": "{:,d} moved",
}
MANY = 100  # runs, from which on their table has no lines
WIDGETS = "ipywidgets"  # what a bar in a notebook needs
WIDE = 150  # columns of a terminal that hold the whole table of `status`


def command_line(*words: object) -> str:
    """Return a `deepclust` command as this user can type it, in this folder."""
    typed = [
        f"./{word}" if isinstance(word, Path) and str(word)[:1] == "-" else word for word in words
    ]
    return shlex.join([*_program(), *map(str, typed)])


def _program() -> list[str]:
    """Return the first words of the command: by the path of the program if it is not on PATH."""
    if shutil.which("deepclust"):
        return ["deepclust"]
    if Path(sys.argv[0]).name != "__main__.py":
        return [os.path.join(os.curdir, os.path.relpath(sys.argv[0]))]
    python = shutil.which("python")
    is_this = python is not None and os.path.samefile(python, sys.executable)
    return ["python" if is_this else sys.executable, "-m", "cluster_jobs.cli"]


class Display:
    """The screen of a run: it is called with the records of a Report, one by one.

    In a notebook: `with Display() as display: deepclust.pretrain(recipe, run, show=display)`. With
    ipywidgets installed that draws a bar, else lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.last_plain = 0.0
        self.pace = Pace()

    @property
    def draws_a_bar(self) -> bool:
        """Whether this is a terminal, or a notebook that can change what it has shown."""
        is_notebook = self.console.is_jupyter and find_spec(WIDGETS) is not None
        return self.console.is_terminal or is_notebook

    def __enter__(self) -> Self:
        if self.draws_a_bar:
            self.bar = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(30),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("starting", total=1, facts="")
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show one event or one piece of progress."""
        self.pace.take(record, time.time())
        if "progress" in record:
            self._show_progress(record)
        elif record["event"] == "clustered":
            self.line(_round_line(record))
        elif record["event"] == "evaluated":
            self.line(_evaluated_line(record))
        elif record["event"] == "loaded":
            self.line(f"start weights: {record['text']}")
        elif record["event"] in ("warning", "replaced"):
            text = record.get("text") or f"{record['count']} unreadable images replaced"
            self.line(f"warning: {text}", style="yellow")

    def _show_progress(self, record: dict[str, Any]) -> None:
        """Show a record with `done` and `of`, of training unless it names another stage."""
        if "done" not in record or "of" not in record:
            return
        stage, round_ = record.get("stage", "train"), record.get("round", -1)
        title = stage if round_ is None or round_ < 0 else f"{stage}, round {round_}"
        facts = [
            shape.format(record[name])
            for name, shape in STAGE_FACTS.items()
            if record.get(name) is not None
        ]
        if record.get("eta") is not None and self.bar is None:  # a bar has its own
            facts.append(f"{duration(record['eta'])} left")
        facts += self._of_run()
        self._move(title, record["done"], record["of"], " · ".join(facts))

    def _of_run(self) -> list[str]:
        """Return how long this attempt has taken, and how long the run will go on."""
        now, words = time.time(), []
        if self.pace.started is not None:
            words.append(f"run {duration(self.pace.spent(now))}")
        if (left := self.pace.left(now)) is not None:
            words.append(f"{duration(left)} to go")
        return [", ".join(words)] if words else []

    def _move(self, title: str, done: int, of: int, facts: str) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description=title, completed=done, total=of, facts=facts)
        elif time.monotonic() - self.last_plain > PLAIN_EVERY_S:
            self.last_plain = time.monotonic()
            self.line(f"{title}: {done}/{of} {facts}")

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line, which is folded on a terminal only: elsewhere people search in it."""
        soft = not self.console.is_terminal
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=soft)


class AtStart:
    """A display that first shows a line, once the run has made its index."""

    BEFORE = ("started", "placed", "waiting")

    def __init__(self, display: Display, text: Callable[[], str]) -> None:
        self.display, self.text = display, text
        self.is_shown = False

    def __call__(self, record: dict[str, Any]) -> None:
        """Show one event or one piece of progress."""
        if not self.is_shown and record.get("event") not in self.BEFORE:
            self.is_shown = True
            self.display.line(self.text())
        self.display(record)


def _round_line(record: dict[str, Any]) -> str:
    facts = [
        f"{name.replace('_', ' ')} {shape.format(record[name])}"
        for name, shape in ROUND_COLUMNS.items()
        if name != "round" and record.get(name) is not None
    ]
    return f"round {record['round']}: " + " · ".join(facts)


def _evaluated_line(record: dict[str, Any]) -> str:
    """Return the score of an evaluation, and which step has the best so far."""
    is_best = record["best"] == record["step"]
    best = "the best so far" if is_best else f"the best is step {record['best']}"
    return f"epoch {record['epoch']:.3g}: kNN top-1 {record['top1']:.1%} · {best}"


def round_table(statistics: list[dict[str, Any]]) -> Table:
    """Return the table with a line for each round that a finished run shows."""
    table = Table(title="rounds")
    for name in ROUND_COLUMNS:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for record in statistics:
        cells = [_cell(record.get(name), shape) for name, shape in ROUND_COLUMNS.items()]
        table.add_row(*cells)
    return table


def scores_line(evaluator: str, values: dict[str, Any]) -> str:
    """Return an evaluator's numbers as a line; tables are in the report and in --json."""
    numbers: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):  # the interval of the number before it
            numbers[-1:] = [f"{one} ± {(value[1] - value[0]) / 2:.4f}" for one in numbers[-1:]]
        elif not isinstance(value, dict):
            numbers.append(f"{name} {value:.4f}")
    return f"{evaluator}: {', '.join(numbers)}"


def scores_lines(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for every evaluator, and below them for those of each baseline."""
    lines = [scores_line(name, values) for name, values in flat_scores(scores).items()]
    rows = scores.get("baselines", {}).get("rows")
    if rows:
        counts = f"{rows['train']:,.0f} training and {rows['test']:,.0f} test images"
        lines.append(f"(pixels and random weights: {counts})")
    return lines


def status_table(states: list[Status], width: int = WIDE) -> Group:
    """Return a table with a line for each run, and below it what there is to say about some.

    Where it would not fit into the width, the first columns and the times are left.
    """
    chosen = [name for name in COLUMNS if width >= WIDE or name in NARROW]
    rows = [[COLUMNS[name](state) for name in chosen] for state in states]
    plain = _plain(chosen, rows, width) if len(rows) > MANY else None
    table = _boxed(chosen, rows, width) if plain is None else plain
    notes = [(visible(state.name), _note(state)) for state in states]
    return Group(table, *(Text(f"{name}: ").append_text(text) for name, text in notes if text))


def _boxed(names: list[str], rows: list[list[str]], width: int) -> Table:
    table = Table(box=None if width < WIDE else box.HEAVY_HEAD)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _plain(names: list[str], rows: list[list[str]], width: int) -> Text | None:
    """Return a table without lines, or None where a cell would have to be folded.

    Rich takes a millisecond for a row of its tables, as long as the status of the run itself.
    """
    sizes = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    if sum(sizes) + 2 * len(sizes) > width:
        return None
    lines = (
        "  ".join(
            cell + " " * (size - cell_len(cell)) for cell, size in zip(row, sizes, strict=True)
        )
        for row in (names, *rows)
    )
    return Text("\n".join(line.rstrip() for line in lines), no_wrap=True, overflow="ignore")


def _epoch(state: Status) -> str:
    return _cell(state.epoch, "{:.1f} of " + str(state.epochs))


def _time(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%d %b %H:%M", time.localtime(seconds))


COLUMNS: dict[str, Callable[[Status], str]] = {
    "run": lambda s: visible(s.name),
    "state": lambda s: s.state,
    "phase": lambda s: s.phase,
    "round": lambda s: _cell(s.round, "{}"),
    "epoch": _epoch,
    "loss": lambda s: _cell(s.loss, "{:.3f}"),
    "images/s": lambda s: _cell(s.images_per_s, "{:,.0f}"),
    "clusters": lambda s: _cell(s.clusters, "{} of " + str(s.k)),
    "moved": lambda s: _cell(s.reassigned, "{:.1%}"),
    "NMI of labels": lambda s: _cell(s.nmi_labels, "{:.3f}"),
    "kNN": lambda s: _cell(s.knn, "{:.1%}" + _best_of(s)),
    "started": lambda s: _time(s.started),
    "elapsed": lambda s: "" if s.elapsed is None else duration(s.elapsed),
    "left": lambda s: "" if s.eta is None else duration(s.eta),
}
NARROW = ("run", "state", "phase", "epoch", "loss", "started", "elapsed", "left")


def _note(state: Status) -> Text:
    """Return what there is to say, with an evaluation that is worse than a baseline in red."""
    said = [Text(visible(state.worse), style="red")] if state.worse else []
    said += [Text(visible(text)) for text in (state.collapse, state.owner or state.reason) if text]
    return Text("; ").join(said)


def _best_of(state: Status) -> str:
    """Return the best score and its step, where it is not the newest."""
    if state.best_knn is None or state.best_knn == state.knn:
        return ""
    return f" (best {state.best_knn:.1%} at step {state.best_step})"


def _cell(value: Any, shape: str) -> str:
    return "" if value is None else shape.format(value)
