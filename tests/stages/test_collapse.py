"""A collapse is said once while the run trains, and in its status."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from cluster_jobs.display import status_table
from cluster_jobs.status import status
from deepclust.methods.base import Now
from deepclust.run.checkpoint import State
from deepclust.run.collapse import LINES, Watch
from deepclust.run.directory import Run, create
from deepclust.run.reporting import Metrics
from deepclust.stages.train import Meter, Totals, log_metrics
from tests.tiny import tiny_recipe


def trained(run: Path, spread: float, lines: int = 2 * LINES) -> list[tuple[str, Any]]:
    """The events of a run whose projections had this spread."""
    events: list[tuple[str, Any]] = []
    report = SimpleNamespace(
        event=lambda name, **fields: events.append((name, fields)), progress=lambda **_: None
    )
    trainer: Any = SimpleNamespace(
        metrics=Metrics(Run(run)), watch=Watch(), report=report,
        loader=SimpleNamespace(waited=0.0), timeline=SimpleNamespace(now=lambda _: Now()),
    )  # fmt: skip
    plan: Any = SimpleNamespace(steps=99)
    for step in range(1, lines + 1):
        totals = Totals({"loss": 1.0, "spread": spread}, 24, 0, False)
        meter = Meter(0.0, norms=[torch.tensor(1.0)])
        log_metrics(trainer, totals, meter, plan, State(step=step), 0.1)
    trainer.metrics.close()
    return events


def test_a_collapse_is_one_warning_and_a_note_of_the_status(tmp_path: Path) -> None:
    create(tmp_path / "run", tiny_recipe(tmp_path))
    ((name, fields),) = trained(tmp_path / "run", spread=0.01)
    assert name == "warning"
    assert fields["text"].startswith(f"step {LINES}: all images have nearly the same projection")
    one = status(Run(tmp_path / "run"))
    assert "network has collapsed" in one.as_dict()["collapse"]
    screen = io.StringIO()
    Console(file=screen, width=400).print(status_table([one]))
    assert "network has collapsed" in screen.getvalue()


def test_a_healthy_run_has_neither(tmp_path: Path) -> None:
    create(tmp_path / "run", tiny_recipe(tmp_path))
    assert trained(tmp_path / "run", spread=0.8) == []
    assert status(Run(tmp_path / "run")).collapse is None
