"""The model card of an export: what is in the run directory about these weights, and nothing else.

It is Markdown under a YAML header, as the Hugging Face hub reads them. Scores are those of
`evaluations/STEP.json` of the exported step, with their intervals and baselines. Without such a
record the card says that nothing was measured, and how to do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from cluster_jobs.listing import items
from cluster_jobs.terminal import recorded_command
from deepclust import __version__
from deepclust.errors import redact
from deepclust.files import read_record
from deepclust.methods import METHODS
from deepclust.models import Backbone
from deepclust.run.directory import ENVIRONMENT, Run
from deepclust.run.scores import flat_scores

LIBRARIES = {"timm": "timm", "hf": "timm", "onnx": "onnx", "torchvision": "torchvision"}
RECORD = {"step": int, "train": str, "test": str, "scores": dict}
NAME = "README.md"
LONGEST = 300  # characters of a cell; a run may be from anybody


@dataclass(frozen=True)
class Card:
    """What a card is of: a run's backbone at a step, in a format; `names` of clusters, if any."""

    run: Run
    backbone: Backbone
    step: int
    format: str
    usage: str
    names: list[str] | None = None


def model_card(card: Card) -> str:
    """Return the text of a model card.

    Raises `DataError` for a record of the run that is damaged.
    """
    method = card.run.recipe.method.name
    recipe = card.run.recipe
    how = "without labels" if recipe.seeds is None or recipe.seeds_judge else "with labels"
    lines = [
        *_header(card, method),
        f"# {card.backbone.name}, pretrained by {method}", "",
        f"Features of {card.backbone.dim} numbers for each image, trained {how} by deepclust "
        f"{__version__}.", "",
        *_section("Use", ["```python", *card.usage.splitlines(), "```", "", *_images(card)]),
        *_section("Training", _table(_training(card))),
        *_section("Scores", list(_scores(card))),
        *_section("Limits", list(_limits(card))),
        *_section("Recipe", ["```yaml", *_recipe(card.run), "```"]),
        *_section("Citation", [_citation(method)]),
    ]  # fmt: skip
    return "\n".join(lines)


def _header(card: Card, method: str) -> list[str]:
    """Return the YAML header; a licence is not in it, because the run does not say one."""
    facts = {
        "library_name": LIBRARIES.get(card.format, "deepclust"),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["deepclust", "self-supervised", method, card.backbone.name.removeprefix("timm/")],
    }
    return ["---", *yaml.safe_dump(facts, sort_keys=False).splitlines(), "---"]


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _images(card: Card) -> list[str]:
    data = card.run.recipe.data
    text = (
        f"Images are resized to a short side of {data.short_side} pixels, cut to the central "
        f"{data.size} x {data.size}, scaled to 0 to 1, and normalised with mean {list(data.mean)} "
        f"and standard deviation {list(data.std)}."
    )
    if card.names is None:
        return [text]
    named = sum(not name.startswith("cluster ") for name in card.names)
    more = f"It tells {len(card.names)} clusters, of which {named} are named by a class."
    return [text, more]


def _training(card: Card) -> Iterator[tuple[str, str]]:
    """Yield what the run directory says of the training."""
    run, recipe = card.run, card.run.recipe
    yield "method", recipe.method.name
    yield "steps", f"{card.step:,}"
    yield "epochs of the recipe", str(run.epochs)
    if recipe.cluster is not None:
        yield "clusters", f"{recipe.cluster.k:,}"
    yield "data", redact(str(recipe.data.shards))
    if (facts := _read(run.path / "data.json", {"n": int, "fingerprint": str})) is not None:
        yield "images", f"{facts['n']:,}"
        yield "data fingerprint", facts["fingerprint"]
    if (env := _read(run.path / "env.json", ENVIRONMENT)) is not None:
        yield "command", recorded_command(env.get("command")) or "not recorded"
        yield "commit", str(env.get("git") or "not from a checkout")
        yield "began", datetime.fromtimestamp(env["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        yield "packages", ", ".join(f"{k} {v}" for k, v in env["packages"].items())


def _scores(card: Card) -> Iterator[str]:
    """Yield the table of the scores of these weights, or that there are none."""
    file = card.run.path / "evaluations" / f"{card.step:08d}.json"
    record = _read(file, RECORD)
    if record is None:
        yield (
            f"These weights, of step {card.step}, were not measured. "
            "`deepclust evaluate RUN --train SHARDS --test SHARDS` does it, and the next export "
            "has the scores."
        )
        return
    yield (
        f"Of frozen features: fitted on `{_cell(record['train'])}`, measured on "
        f"`{_cell(record['test'])}`. What a baseline reaches too, pretraining did not bring."
    )
    yield ""
    yield "| what | measure | value | 95 % interval |"
    yield "|---|---|---|---|"
    for name, values in flat_scores(record["scores"]).items():
        yield from _rows(name, values)


def _rows(name: str, values: Any) -> Iterator[str]:
    """Yield a row for each number of an evaluator."""
    if not isinstance(values, dict):
        return
    intervals = values.get("interval")
    for measure, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            interval = _interval(measure, intervals, values)
            yield f"| {_cell(name)} | {_cell(measure)} | {value:.4f} | {interval} |"


def _interval(measure: str, given: Any, values: dict[str, Any]) -> str:
    """Return the interval of a measure, which the evaluation puts beside the first one."""
    first = next(iter(values), None)
    pair = given if measure == first else None
    if isinstance(pair, list) and len(pair) == 2:
        return f"{pair[0]:.4f} to {pair[1]:.4f}"
    return ""


def _limits(card: Card) -> Iterator[str]:
    data = card.run.recipe.data
    yield f"- It was trained on images of {data.size} pixels; others were not tried."
    yield "- The biases of its training images were not measured."
    if card.backbone.sobel is not None:
        yield "- Its first layer is a fixed Sobel filter: it sees no colour."
    if card.names is not None:
        yield (
            "- Clusters are not classes. Where the margin is near 0, other hardware may tell "
            "another cluster."
        )
    epochs = [e for e in card.run.events() if e["event"] == "finished"]
    if not epochs:
        yield "- The run had not finished when this was exported."


def _recipe(run: Run) -> list[str]:
    """Return the resolved recipe, without what is in the addresses of data."""
    return redact(run.recipe.dump()).replace("```", "'''").splitlines()


def _citation(method: str) -> str:
    if method not in METHODS:
        return f"The method, `{_cell(method)}`, is not one of deepclust: ask its author."
    (one,) = (item for item in items("methods", method) if item.name == method)
    return f"{one.paper}, for the method. The weights have no paper."


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return ["| what | value |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows)]


def _cell(value: object) -> str:
    """Return a text that stays in its cell."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _read(path: Path, fields: dict[str, Any]) -> dict[str, Any] | None:
    """Return a record of the run, None where there is none."""
    return read_record(path, fields) if path.exists() else None
