"""How a run looks in a notebook: a few facts of its files, as a table of HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from deepclust.errors import DeepclustError
from deepclust.run.glance import newest_metrics

if TYPE_CHECKING:
    from deepclust.run.directory import Run

ENDS = {"finished": "finished", "stopped": "stopped"}


def html_of(run: Run) -> str:
    """Return a table of a run: its newest event, epoch, loss, rounds and clusters.

    Anybody may have written the files, so every text is escaped.
    """
    try:
        facts = _facts(run)
    except DeepclustError as error:  # a notebook shows the object all the same
        facts = {"cannot be read": str(error)}
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<table><caption>{escape(str(run.path))}</caption>{rows}</table>"


def _facts(run: Run) -> dict[str, Any]:
    events = [event for event in run.events() if event["event"] != "notified"]
    trained = newest_metrics(run.path / "metrics.jsonl", "train", 1)
    last, rounds = trained[-1] if trained else {}, run.rounds()
    clustered = [event for event in events if event["event"] == "clustered"]
    name = events[-1]["event"] if events else "not started"
    return {
        "state": ENDS.get(name, f"last event: {name}"),
        "method": run.recipe.method.name,
        "backbone": run.recipe.backbone.name,
        "epoch": f"{last['epoch']:.1f} of {run.epochs}" if last.get("epoch") is not None else None,
        "loss": f"{last['loss']:.3f}" if last.get("loss") is not None else None,
        "round": rounds[-1] if rounds else None,
        "clusters": clustered[-1]["k"] - clustered[-1]["empty"] if clustered else None,
    }
