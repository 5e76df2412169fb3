"""The seeded part of a round: prototypes before k-means, claimed samples and a verdict after it.

`seeds.py` knows the labels, `clustering/prototypes.py` the arithmetic; here they meet the run's
files. Nothing depends on who computes it, so every rank of a gang does all of it by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.class_prototypes import Prototypes, averaged, claims, judged, prototypes
from deepclust.clustering.whiten import Whitening
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.files import read_json, write_json
from deepclust.recipe import Recipe
from deepclust.recipe.sections import SeedsSection
from deepclust.run.directory import Run, manifest
from deepclust.seeds.table import SHOWN, Seeds, SeedTable

Rows = Float[np.ndarray, "n d"]  # all samples' whitened rows, memory-mapped float16


@dataclass(frozen=True)
class SeededRound:
    """The labels that have a row this round, and the prototypes that they give."""

    config: SeedsSection
    table: SeedTable
    held_out: SeedTable | None
    prototypes: Prototypes
    pinned: bool  # else they are only where k-means starts
    notes: list[str]

    @property
    def count(self) -> int:
        """How many clusters, the first ones, are seeded."""
        return len(self.prototypes.rows)

    def names_of(self, clusters: Int64[np.ndarray, " s"]) -> str:
        """The classes of some seeded clusters, for a message."""
        names = [self.table.names[self.prototypes.class_of[j]] for j in clusters]
        return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")

    def continues(self, before: Path) -> Bool[np.ndarray, " M"]:
        """Which seeded clusters stood for the same class in the round of that folder."""
        then, old = np.full(self.count, -1), read(before)
        if old is not None:
            both = min(self.count, len(old.class_of))
            then[:both] = old.class_of[:both]
        return np.asarray(self.prototypes.class_of == then)

    def claim(
        self, rows: Rows, centroids: Float32[np.ndarray, "k d"]
    ) -> tuple[Int32[np.ndarray, " m"], Float32[np.ndarray, " m"]]:
        """The nearest cluster of its class for every labelled sample, and the distance to it."""
        points = ArrayPoints(rows).select(self.table.ids)
        return claims(points, self.table.classes, self.prototypes.class_of, centroids)


def check(run: Run, recipe: Recipe, seeds: Seeds) -> None:
    """Raise `RecipeError` for more prototypes than clusters, `RunDiffersError` for other labels."""
    config, cluster = recipe.seeds, recipe.clustering
    assert config is not None
    refresh = recipe.method.round
    level = "supers" if refresh is not None and refresh.levels == 2 else "k"
    room, classes = getattr(cluster, level), len(seeds.table.names)
    if classes * config.prototypes > room:
        raise RecipeError(
            f"{classes} classes with seeds.prototypes={config.prototypes} need cluster.{level} of "
            f"at least {classes * config.prototypes}, and it is {room}"
        )
    for number in run.rounds()[-1:]:
        inputs = manifest(run.round(number) / "assignments")["inputs"]
        if inputs.get("seeds", seeds.table.digest) != seeds.table.digest:
            raise RunDiffersError(
                f"the labels of {config.labels} are not those that {run.path} began with: its "
                f"round {number} was seeded by others. Put them back, or start a new run."
            )


def begin(
    run: Run,
    number: int,
    seeds: Seeds,
    config: SeedsSection,
    rows: Rows,
    excluded: Int64[np.ndarray, " e"],
    seed: int,
) -> SeededRound:
    """The prototypes of a round, from all rows; averaged with those of the round before.

    Raises `DataError` for a class without a row, `NumericalError` for one without a direction.
    """
    table, notes = seeds.in_round(excluded)
    points = ArrayPoints(rows).select(table.ids)
    found = prototypes(points, table.classes, table.names, config.prototypes, seed)
    if config.momentum or config.prototypes > 1:
        found = _continued(run, number, found, config.momentum)
    held_out = None if seeds.held_out is None else seeds.held_out.without(excluded)
    pinned = config.release_after is None or number <= config.release_after
    return SeededRound(config, table, held_out, found, pinned, notes)


def _continued(run: Run, number: int, found: Prototypes, momentum: float) -> Prototypes:
    """In the order of the last round's prototypes, and averaged with them."""
    before = [r for r in run.rounds() if r < number]
    if not before or (old := read(run.round(before[-1]))) is None:
        return found
    then, now = (_whitening(run.round(r)) for r in (before[-1], number))
    return averaged(found, old, then, now, momentum)


def _whitening(folder: Path) -> Whitening:
    return Whitening.load(folder / "whitening" / "whitening.safetensors")


def save(found: SeededRound, stage: Path) -> None:
    """Write the prototypes and what they stand for into the centroids stage."""
    parts, names = found.prototypes, found.table.names
    np.save(stage / "prototypes.npy", parts.rows)
    clusters = [
        {"cluster": j, "class_id": int(c), "class": names[c], "labelled": int(count)}
        for j, (c, count) in enumerate(zip(parts.class_of, parts.counts, strict=True))
    ]
    write_json(
        stage / "prototypes.json",
        {"pinned": found.pinned, "classes": names, "clusters": clusters},
    )


def read(folder: Path) -> Prototypes | None:
    """The prototypes of a round's folder; None if it was not seeded."""
    stage = folder / "centroids"
    if not (stage / "prototypes.npy").exists():
        return None
    clusters = read_json(stage / "prototypes.json")["clusters"]
    class_of, counts = (np.array([c[key] for c in clusters]) for key in ("class_id", "labelled"))
    rows = np.load(stage / "prototypes.npy")
    return Prototypes(rows, class_of.astype(np.int32), counts.astype(np.int64))


def verdict(
    found: SeededRound,
    rows: Rows,
    clusters: Int32[np.ndarray, " n"],
    centroids: Float32[np.ndarray, "k d"],
) -> dict[str, Any]:
    """How the seeded clusters do (see `judged`), on one level's clusters (-1 = excluded).

    `accuracy`: held-out samples of the seeds' classes whose nearest seeded centroid is of their
    class, free clusters left aside. None where nothing is held out.
    """
    parts, names = found.prototypes, found.table.names
    sizes: Int64[np.ndarray, " k"] = np.bincount(clusters[clusters >= 0], minlength=len(centroids))
    held = found.held_out or found.table.where(np.zeros(len(found.table), bool))
    facts = judged(parts, names, sizes, clusters[held.ids], held.classes)
    own = held.where(held.classes < len(names))
    accuracy = None
    if len(own):
        points = ArrayPoints(rows).select(own.ids).configured(unit=True, backend="torch")
        nearest = points.visit(torch.from_numpy(centroids[: found.count])).labels.numpy()
        accuracy = float((parts.class_of[nearest] == own.classes).mean())
    return {"pinned": found.pinned, "accuracy": accuracy, **facts}
