"""The seeded part of a round: prototypes before k-means, claimed samples and a report after it.

`seeds/table.py` reads the labels, `clustering/class_prototypes.py` has the arithmetic. This file
connects both to the files of the run. Every rank computes all of it, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.class_prototypes import (
    Prototypes,
    average,
    class_prototypes,
    nearest_of_class,
    score_seeds,
)
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.files import write_json
from deepclust.recipe import Recipe
from deepclust.recipe.sections import SeedsSection
from deepclust.run.directory import Run, has_file, manifest
from deepclust.run.final_round import trained_number
from deepclust.run.round_files import (
    find_whitening,
    last_round_before,
    read_array,
    read_facts,
)
from deepclust.seeds.table import SHOWN, Seeds, SeedTable

Rows = Float[np.ndarray, "n d"]  # all samples' features, memory-mapped float16


@dataclass(frozen=True)
class SeededRound:
    """The labels that have a row this round, and the prototypes that they give."""

    config: SeedsSection
    table: SeedTable
    held_out: SeedTable | None
    prototypes: Prototypes
    pinned: bool  # else k-means only starts from them
    notes: list[str]

    @property
    def count(self) -> int:
        """The number of seeded clusters, which are the first ones."""
        return len(self.prototypes.rows)

    def names_of(self, clusters: Int64[np.ndarray, " s"]) -> str:
        """Return the classes of some seeded clusters, for a message."""
        names = [self.table.names[self.prototypes.class_of[j]] for j in clusters]
        return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")

    def continues(self, before_dir: Path) -> Bool[np.ndarray, " M"]:
        """Return which seeded clusters had the same class in the round of that folder."""
        then, old = np.full(self.count, -1), read(before_dir)
        if old is not None:
            both = min(self.count, len(old.class_of))
            then[:both] = old.class_of[:both]
        return np.asarray(self.prototypes.class_of == then)

    def claim(
        self, rows: Rows, centroids: Float32[np.ndarray, "k d"]
    ) -> tuple[Int32[np.ndarray, " m"], Float32[np.ndarray, " m"]]:
        """Return every labelled sample's nearest cluster of its class, and the distance to it."""
        points = ArrayPoints(rows).select(self.table.sample_ids)
        return nearest_of_class(points, self.table.classes, self.prototypes.class_of, centroids)


def check(run: Run, recipe: Recipe, seeds: Seeds) -> None:
    """Raise `RecipeError` for more prototypes than clusters, `RunDiffersError` for other labels."""
    config, cluster, refresh = recipe.seeds, recipe.clustering, recipe.method.round
    assert config is not None
    assert refresh is not None
    level = "supers" if refresh.levels == 2 else "k"
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
                f"round {number} was seeded with other labels. Restore them, or start a new run."
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
    """Return the prototypes of a round, averaged with those of the round before.

    Raises `DataError` for a class without a row, `NumericalError` for one without a direction.
    """
    table, notes = seeds.in_round(excluded)
    points = ArrayPoints(rows).select(table.sample_ids)
    new = class_prototypes(points, table.classes, table.names, config.prototypes, seed)
    if config.momentum or config.prototypes > 1:
        new = _continue(run, number, new, config.momentum)
    held_out = None if seeds.held_out is None else seeds.held_out.without(excluded)
    last = trained_number(run, number)
    pinned = config.release_after is None or last <= config.release_after
    return SeededRound(config, table, held_out, new, pinned, notes)


def _continue(run: Run, number: int, new: Prototypes, momentum: float) -> Prototypes:
    """Return the prototypes in the order of the last round's, and averaged with them."""
    last = last_round_before(run, number)
    if last is None or (old := read(run.round(last))) is None:
        return new
    then, now = (find_whitening(run.round(r)) for r in (last, number))
    return average(new, old, then, now, momentum)


def save(seeded: SeededRound, stage: Path) -> None:
    """Write the prototypes and their classes into the centroids stage."""
    parts, names = seeded.prototypes, seeded.table.names
    np.save(stage / "prototypes.npy", parts.rows)
    clusters = [
        {"cluster": j, "class_id": int(c), "class": names[c], "labelled": int(count)}
        for j, (c, count) in enumerate(zip(parts.class_of, parts.counts, strict=True))
    ]
    write_json(
        stage / "prototypes.json",
        {"pinned": seeded.pinned, "classes": names, "clusters": clusters},
    )


def read(round_dir: Path) -> Prototypes | None:
    """Return the prototypes of a round's folder, or None if it was not seeded."""
    stage = round_dir / "centroids"
    if not has_file(stage, "prototypes.npy"):
        return None
    clusters = read_facts(stage, "prototypes.json")["clusters"]
    class_of, counts = (np.array([c[key] for c in clusters]) for key in ("class_id", "labelled"))
    rows = np.array(read_array(stage, "prototypes.npy"))
    return Prototypes(rows, class_of.astype(np.int32), counts.astype(np.int64))


def evaluate_seeds(
    seeded: SeededRound,
    rows: Rows,
    cluster_ids: Int32[np.ndarray, " n"],
    centroids: Float32[np.ndarray, "k d"],
) -> dict[str, Any]:
    """Return statistics of the seeded clusters (see `score_seeds`), on one level (-1 = excluded).

    `accuracy`: the share of held-out samples of the seeds' classes whose nearest seeded centroid is
    of their class, free clusters left aside. None where nothing is held out.
    """
    parts, names = seeded.prototypes, seeded.table.names
    valid = cluster_ids[cluster_ids >= 0]
    sizes: Int64[np.ndarray, " k"] = np.bincount(valid, minlength=len(centroids))
    held = seeded.held_out or seeded.table.where(np.zeros(len(seeded.table), bool))
    facts = score_seeds(parts, names, sizes, cluster_ids[held.sample_ids], held.classes)
    own = held.where(held.classes < len(names))
    accuracy = None
    if len(own):
        points = ArrayPoints(rows).select(own.sample_ids).configure(spherical=True, backend="torch")
        seeded_centroids = torch.from_numpy(centroids[: seeded.count])
        nearest = points.assign_to(seeded_centroids).cluster_ids.numpy()
        accuracy = float((parts.class_of[nearest] == own.classes).mean())
    return {"pinned": seeded.pinned, "accuracy": accuracy, **facts}
