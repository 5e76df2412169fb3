"""The facts of a report, read from the files of a run: plain values, nothing is drawn yet."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cluster_jobs.evaluations import Score, read_scores
from cluster_jobs.report.seeds import seeds_of
from cluster_jobs.status import Status
from cluster_jobs.status import status as status_of
from deepclust.data.shards.find import described
from deepclust.errors import DataError
from deepclust.files import file_hash, read_record
from deepclust.recipe import Recipe
from deepclust.recipe.sections import MethodSection, parse_cadence
from deepclust.run import labels
from deepclust.run.directory import ENVIRONMENT, Run
from deepclust.run.labels import class_names
from deepclust.run.round_files import read_statistics

Record = dict[str, Any]
UNKNOWN = "not known before the run starts"
STATISTICS = (  # of a round or of a head that the page shows; None where a run has none
    *("k", "n", "excluded", "sizes", "entropy_ratio", "largest_share", "inertia", "forced"),
    *("reassigned", "nmi_previous", "nmi_labels", "ari_labels", "accuracy_labels"),
)
MOST_CELLS, MOST_CONFUSED = 41, 10  # columns of a confusion matrix, and pairs that are listed
SIZES = {"min": None, "median": None, "max": None}


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page."""

    name: str
    value: str


@dataclass(frozen=True)
class Answered:
    """The tables of a run's own answers, of the newest evaluation that has them."""

    source: str
    classes: Record
    calibration: Record
    confusion: Record | None  # with the `shares` of each row, None where there are many classes
    confused: list[tuple[str, str, float]]  # the most frequent wrong answers: class, answer, images


@dataclass(frozen=True)
class Export:
    """A file in export/."""

    path: str
    bytes: int
    hash: str
    """blake2b of the file."""


@dataclass(frozen=True)
class Facts:
    """A run in numbers and words."""

    name: str
    status: Status
    recipe: Recipe
    recipe_text: str
    essentials: list[tuple[str, str]]
    tiles: list[Tile]
    rounds: list[Record]
    heads: list[Record]  # of the last round, where it has several
    seeds: Record | None  # the seeded clusters of the last round
    train: list[Record]
    scores: list[Score]
    answered: Answered | None  # how the run's own classifier was judged
    labels: list[tuple[str, int]]  # the seeds' classes and their labels, where batches hold them
    exports: list[Export]
    commands: list[tuple[str, str]]
    classes: int = 0  # of the labels in its batches
    evaluated: list[Record] = field(default_factory=list)  # by kNN, while it was trained
    precisions: Record | None = None  # by class, where images are of several

    @property
    def guess(self) -> float:
        """The loss of a network that has learnt nothing."""
        return self.recipe.method.guess(self.recipe, self.classes)


def gather(run: Run) -> Facts:
    """Return everything but the images."""
    recipe, train = run.recipe, run.metrics("train")
    status = status_of(run)
    scores, tables = read_scores(run)
    rounds = [_round(run, number, train) for number in run.rounds()]
    return Facts(
        name=run.path.resolve().name,
        status=status,
        recipe=recipe,
        recipe_text=recipe.show(),
        essentials=_essentials(run, recipe),
        tiles=_tiles(status, rounds, scores),
        rounds=rounds,
        heads=[_statistics(head) for head in rounds[-1].get("heads", [])] if rounds else [],
        seeds=seeds_of(run, rounds),
        train=train,
        scores=scores,
        answered=_answered(tables),
        labels=_labels(run),
        exports=[
            Export(str(file), file.stat().st_size, file_hash(file))
            for file in sorted((run.path / "export").glob("[!.]*"))
        ],
        commands=_commands(run, recipe, status.state),
        classes=len(class_names(run)),
        evaluated=run.metrics("evaluate"),
        precisions=tables.get(("multi_label", "classes")),
    )


def _round(run: Run, number: int, train: list[Record]) -> Record:
    """Return the statistics of a round, and the mean loss of the training on it."""
    statistics = read_statistics(run, number)
    losses = [record["loss"] for record in train if record["round"] == number]
    mean = sum(losses) / len(losses) if losses else None
    return {**_statistics(statistics), "round": number, "loss": mean}


def _statistics(record: Record) -> Record:
    """Return a record with None for each statistic that it lacks, so that the page can name it."""
    complete = {**dict.fromkeys(STATISTICS), **record}
    return {**complete, "sizes": {**SIZES, **(complete["sizes"] or {})}}


def _essentials(run: Run, recipe: Recipe) -> list[tuple[str, str]]:
    data, train = recipe.data, recipe.train
    return [
        (
            "Backbone",
            recipe.backbone.name + (" on Sobel gradients" if recipe.backbone.sobel else ""),
        ),
        ("Method", f"{recipe.method.name}, {_choices(recipe.method)}"),
        *_clusters(recipe),
        ("Training", f"{train.epochs} epochs, batch {train.batch:,}, rate {train.lr:g}"),
        ("Ranks", f"{train.ranks}, seed {recipe.seed}"),
        ("Data", f"{described(data.shards)} at {data.size} px"),
        *_data(run),
        *_environment(run),
    ]


def _choices(method: MethodSection) -> str:
    """Return what a method's section holds beside its name."""
    chosen = method.model_dump(exclude={"name", "sampling"})
    return ", ".join(f"{key} {value}" for key, value in chosen.items())


def _clusters(recipe: Recipe) -> list[tuple[str, str]]:
    cluster, refresh = recipe.cluster, recipe.method.round
    if cluster is None or refresh is None:
        return []
    inside = f" in {cluster.supers:,} super-clusters" if cluster.supers > 1 else ""
    whitened = f"of {cluster.dim} dimensions, " if refresh.whiten else ""
    in_all = parse_cadence(cluster.every).unit == "round"
    when = f"{cluster.every} in all" if in_all else f"again every {cluster.every}"
    return [("Clusters", f"{cluster.k:,}{inside}, {whitened}{when}")]


def _tiles(status: Status, rounds: list[Record], scores: list[Score]) -> list[Tile]:
    """Return how far the run is, how fast, and its best scores."""
    tiles = []
    if status.epoch is not None:
        tiles.append(Tile(f"of {status.epochs} epochs", f"{status.epoch:.3g}"))
    if rounds:
        tiles.append(Tile("rounds", str(len(rounds))))
    for key, name in (("nmi_previous", "NMI to previous round"), ("nmi_labels", "NMI to labels")):
        if rounds and rounds[-1].get(key) is not None:
            tiles.append(Tile(name, f"{rounds[-1][key]:.3f}"))
    top1 = [score for score in reversed(scores) if score.measure == "top1"]
    first = {score.evaluator: score for score in top1 if not score.evaluator.startswith("baseline")}
    tiles += [Tile(f"{name} top-1", f"{score.value:.1%}") for name, score in first.items()]
    if status.images_per_s:
        tiles.append(Tile("images a second", f"{status.images_per_s:,.0f}"))
    return tiles


def _environment(run: Run) -> list[tuple[str, str]]:
    path = run.path / "env.json"
    if not path.exists():
        return []
    try:
        env = read_record(path, ENVIRONMENT)
        started = datetime.fromtimestamp(env["time"]).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    except (DataError, ValueError, OverflowError, OSError) as error:  # no time on this earth
        return [("Created", f"not known: {error}")]
    versions = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    code = str(env.get("git") or "not from a git checkout")
    return [("Created", f"{started} on {env['host']}"), ("Code", code[:12]), ("With", versions)]


def _data(run: Run) -> list[tuple[str, str]]:
    """Return which samples the run began with.

    Its first process records them.
    """
    path = run.path / "data.json"
    data = read_record(path, {"n": int, "fingerprint": str}) if path.exists() else None
    samples, fingerprint = (f"{data['n']:,}", data["fingerprint"]) if data else (UNKNOWN,) * 2
    return [("Samples", samples), ("Fingerprint", fingerprint)]


def _labels(run: Run) -> list[tuple[str, int]]:
    kept = labels.read(run)
    if kept is None or kept.counts is None:
        return []
    return list(zip(kept.classes, kept.counts, strict=False))


def _answered(tables: dict[tuple[str, str], Record]) -> Answered | None:
    """Return the tables of the evaluator `classifier`, if it was evaluated."""
    own = {name: table for (evaluator, name), table in tables.items() if evaluator == "classifier"}
    if not {"classes", "calibration"} <= own.keys():
        return None
    confusion = own.get("confusion")
    if confusion is not None:
        sums = [sum(v or 0 for v in row) or 1 for row in confusion["values"]]
        pairs = zip(confusion["values"], sums, strict=True)
        shares = [[(v or 0) / total for v in row] for row, total in pairs]
        confusion = {**confusion, "shares": shares}
    few = None if confusion is None or len(confusion["columns"]) > MOST_CELLS else confusion
    return Answered(
        own["classes"]["source"], own["classes"], own["calibration"], few, _confused(confusion)
    )


def _confused(confusion: Record | None) -> list[tuple[str, str, float]]:
    """Return the most frequent wrong answers."""
    if confusion is None:
        return []
    wrong = [
        (row, column, count)
        for row, counts in zip(confusion["rows"], confusion["values"], strict=True)
        for column, count in zip(confusion["columns"], counts, strict=True)
        if row != column and count
    ]
    return sorted(wrong, key=lambda one: -one[2])[:MOST_CONFUSED]


def _commands(run: Run, recipe: Recipe, state: str) -> list[tuple[str, str]]:
    """Return what to type next, and what it does."""
    name = shlex.quote(str(run.path))
    report = f"deepclust report {name} --out {shlex.quote(str(run.path / 'report.html'))}"
    watch = [(f"deepclust logs {name} -f", "follow it"), (report, "write this page again")]
    if state == "RUNNING":
        return [*watch, (f"deepclust cancel {name}", "stop at the next step; can be resumed")]
    if state != "SUCCEEDED":
        return [(f"deepclust resume {name}", "continue from what is on disk"), *watch]
    table = f"deepclust assignments {name} --out clusters.parquet"
    return [
        (f"deepclust evaluate {name} --train SHARDS --test SHARDS", "kNN, linear probe, clusters"),
        *([(table, "which image is in which cluster")] if recipe.assigns else []),
        (f"deepclust export {name} --format safetensors --out backbone.safetensors", "weights"),
    ]
