"""What a person sees of a run in the foreground: a live bar on a terminal, plain lines elsewhere.

Everything goes to stderr; stdout is for results.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster_jobs.status import Status

PLAIN_EVERY_S = 10.0


def typed(*words: object) -> str:
    """A `deepclust` command as this user can type it: by its path where it is not on PATH."""
    program = "deepclust" if shutil.which("deepclust") else os.path.relpath(sys.argv[0])
    return shlex.join([program, *map(str, words)])


ROUND_COLUMNS = {
    "round": "{:d}", "inertia": "{:.4f}", "entropy_ratio": "{:.3f}", "largest_share": "{:.2%}",
    "reassigned": "{:.2f}", "nmi_previous": "{:.3f}", "nmi_labels": "{:.3f}",
    "accuracy_labels": "{:.3f}", "seconds": "{:.1f}",
}  # fmt: skip


class Display:
    """Takes the records of a Report, one by one."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.units = 0
        self.last_plain = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<22}"), BarColumn(30),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(), TextColumn("{task.fields[facts]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("starting", total=1, facts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show one event or one piece of progress."""
        if "progress" in record and "stage" in record:  # k-means and other long stages
            facts = f"{record['eta']:.0f} s left"
            self._move(
                f"{record['stage']}, round {record['round']}", record["done"], record["of"], facts
            )
        elif "progress" in record:
            facts = (
                f"loss {record['loss']:.3f} · {record['images_per_s']:,.0f} images/s · "
                f"waiting for data {record['waiting']:.0%}"
            )
            what = "train" if record["round"] < 0 else f"train, round {record['round']}"
            self._move(what, record["done"], record["of"], facts)  # -1: the method has no rounds
        elif record["event"] == "unit":
            self.units += 1
            self._move(f"extract, round {record['round']}", self.units, record["of"], "units")
        elif record["event"] == "clustered":
            self.units = 0
            self.console.print(_round_line(record), highlight=False, markup=False)
        elif record["event"] in ("warning", "replaced"):
            text = record.get("text") or f"{record['count']} unreadable images replaced"
            self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)

    def _move(self, what: str, done: int, of: int, facts: str) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, description=what, completed=done, total=of, facts=facts)
        elif time.monotonic() - self.last_plain > PLAIN_EVERY_S:
            self.last_plain = time.monotonic()
            self.console.print(f"{what}: {done}/{of} {facts}", highlight=False)


def _round_line(record: dict[str, Any]) -> str:
    facts = [
        f"{name.replace('_', ' ')} {shape.format(record[name])}"
        for name, shape in ROUND_COLUMNS.items()
        if name != "round" and record.get(name) is not None
    ]
    return f"round {record['round']}: " + " · ".join(facts)


def round_table(statistics: list[dict[str, Any]]) -> Table:
    """The table by round that a finished run shows."""
    table = Table(title="rounds")
    for name in ROUND_COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    for record in statistics:
        cells = [
            "" if record.get(name) is None else shape.format(record[name])
            for name, shape in ROUND_COLUMNS.items()
        ]
        table.add_row(*cells)
    return table


def status_table(found: list[Status]) -> Table:
    """One line a run."""
    table = Table(
        "run", "state", "phase", "round", "epoch", "loss", "images/s", "clusters", "moved",
        "NMI of labels", "what to know",
    )  # fmt: skip
    for one in found:
        epoch = "" if one.epoch is None else f"{one.epoch:.1f} of {one.epochs}"
        cells = (
            "" if one.round is None else str(one.round), epoch,
            "" if one.loss is None else f"{one.loss:.3f}",
            "" if one.images_per_s is None else f"{one.images_per_s:,.0f}",
            "" if one.clusters is None else f"{one.clusters} of {one.k}",
            "" if one.reassigned is None else f"{one.reassigned:.1%}",
            "" if one.nmi_labels is None else f"{one.nmi_labels:.3f}",
        )  # fmt: skip
        table.add_row(
            escape(one.name), one.state, one.phase, *cells, escape(one.owner or one.reason)
        )
    return table
