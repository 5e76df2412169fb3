"""A run directory made by hand, for what only reads run directories: report and exports.

The features are the class and a little noise, clustered by rank of a random projection, so it
costs nothing; the layout, the manifests and the records are those of a real run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deepclust.clustering.statistics import describe
from deepclust.data.shards.index import Index, open_index
from deepclust.files import append_json, read_json, write_json
from deepclust.recipe import Recipe
from deepclust.run.directory import create, seal

EXCLUDED = {5: "truncated after 99 bytes", 17: "not an image"}


def make_run(
    folder: Path, shards: Path, rounds: int = 3, k: int = 6, steps: int = 8, **sections: Any
) -> Path:
    """A finished run of `rounds` rounds over the shards; sample ids in EXCLUDED have no cluster.

    With 0 rounds it is a run whose process died at once. `sections` replace those of the recipe.
    """
    tree: dict[str, Any] = {
        "data": {"shards": str(shards), "size": 32, "resize": 32},
        "backbone": {"name": "resnet18_small"},
        "cluster": {"k": k, "dim": 8},
        "train": {"epochs": max(1, rounds), "batch": 16},
    }
    create(folder, Recipe.parse(tree | sections))
    index = open_index(shards)
    _event(folder, event="started")
    before = None
    if rounds:
        _data(folder, index)
    for number in range(rounds):
        before = _round(folder, index, number, k, before)
        _train(folder, number, steps, k)
    if rounds:
        _event(folder, event="finished", epochs=rounds)
    return folder


def make_simclr(folder: Path, shards: Path, steps: int = 8) -> Path:
    """A finished run of one epoch without clusters."""
    tree = {
        "data": {"shards": str(shards), "size": 32, "resize": 32},
        "backbone": {"name": "resnet18_small"},
        "method": {"name": "simclr"},
        "train": {"epochs": 1, "batch": 16},
    }
    create(folder, Recipe.parse(tree))
    _data(folder, open_index(shards))
    _event(folder, event="started")
    _train(folder, -1, steps, k=31, spread=0.8)
    _event(folder, event="finished", epochs=1)
    return folder


def pin(folder: Path, number: int, names: list[str]) -> None:
    """Let a round's first (super-)clusters be pinned to classes, judged by 10 labels."""
    clusters = [{"cluster": i, "class": name, "labelled": 2} for i, name in enumerate(names)]
    stage = folder / "rounds" / f"{number:04d}"
    write_json(stage / "centroids" / "prototypes.json", {"pinned": True, "clusters": clusters})
    judged = {"size": 9, "share": 0.1, "purity": 0.8, "recall": 0.7}
    scores = {
        "pinned": True, "accuracy": 0.75, "held_out": 10, "classes": [*names, "other"],
        "confusion": np.eye(len(names) + 1, dtype=int).tolist(),
        "clusters": [one | judged for one in clusters],
    }  # fmt: skip
    write_json(stage / "assignments" / "seeds.json", scores)
    for name in ("centroids", "assignments"):
        reseal(stage / name)


def reseal(stage: Path) -> None:
    """Seal a stage again, whose files a test has changed."""
    inputs = read_json(stage / "manifest.json")["inputs"]
    for name in ("manifest.json", "DONE"):
        (stage / name).unlink()
    seal(stage, inputs)


def _data(folder: Path, index: Index) -> None:
    facts = {"fingerprint": index.fingerprint, "n": len(index), "shards": len(index.shards)}
    write_json(folder / "data.json", {**facts, "read": "offset"})


def _event(folder: Path, **fields: object) -> None:
    append_json(folder / "events.jsonl", {"time": 0.0, "attempt": 1, **fields})


def _round(
    folder: Path, index: Index, number: int, k: int, before: np.ndarray | None
) -> np.ndarray:
    random = np.random.default_rng(number)
    classes = np.arange(len(index)) if index.labels is None else np.asarray(index.labels)
    noisy = random.random(len(index)) < 0.5 / (1 + number)
    kinds = max(1, k // (int(classes.max()) + 1))  # clusters a class
    pure = (classes * kinds + np.arange(len(index)) % kinds) % k
    assignments = np.where(noisy, random.integers(0, k, len(index)), pure).astype(np.int32)
    distances = random.uniform(0.1, 1.0, len(index)).astype(np.float32)
    assignments[list(EXCLUDED)], distances[list(EXCLUDED)] = -1, np.nan
    statistics = describe(assignments, k, previous=before, classes=index.labels)
    statistics |= {"round": number, "inertia": 0.5 / (1 + number), "forced": 0, "seconds": 1.0}
    stage = folder / "rounds" / f"{number:04d}"
    _features(stage / "features", index)
    (stage / "assignments").mkdir()
    np.save(stage / "assignments" / "assignments.npy", assignments[None])
    np.save(stage / "assignments" / "distances.npy", distances[None])
    shutil.copy(stage / "features" / "excluded.parquet", stage / "assignments")
    write_json(stage / "assignments" / "statistics.json", statistics)
    cluster = Recipe.load(folder / "recipe.yaml").clustering
    supers = {"supers": cluster.supers} if cluster.supers > 1 else {}
    seal(stage / "assignments", {"data": index.fingerprint, "round": number, "k": k, **supers})
    (stage / "centroids").mkdir()
    seal(stage / "centroids", {"data": index.fingerprint})
    return assignments


def _features(stage: Path, index: Index) -> None:
    stage.mkdir(parents=True)
    ids = pa.array(list(EXCLUDED), pa.int64())
    table = pa.table({"sample_id": ids, "reason": pa.array(EXCLUDED.values(), pa.string())})
    pyarrow.parquet.write_table(table, stage / "excluded.parquet")
    seal(stage, {"data": index.fingerprint})


def _train(folder: Path, number: int, steps: int, k: int, **scalars: float) -> None:
    segment = max(0, number)  # without clusters the number is -1
    for step in range(segment * steps + 1, (segment + 1) * steps + 1):
        wave = 0.2 * np.sin(step)
        loss = float(np.log(k) * (0.4 + 0.5 / (1 + segment) * 0.9 ** (step % steps))) + wave
        append_json(
            folder / "metrics.jsonl",
            {"kind": "train", "attempt": 1, "step": step, "round": number, "loss": loss,
             "epoch": step / steps, "lr": 0.05, "images_per_s": 900.0, "waiting": 0.1, "time": 1.0,
             **scalars},
        )  # fmt: skip


def evaluate(folder: Path, step: int = 24) -> None:
    """Add the record of `deepclust evaluate`."""
    scores = {"knn": {"top1": 0.8765}, "clusters": {"nmi": 0.61, "ari": 0.5, "accuracy": 0.66}}
    record = {"step": step, "train": "data/train", "test": "data/test", "scores": scores}
    (folder / "evaluations").mkdir(exist_ok=True)
    write_json(folder / "evaluations" / f"{step:08d}.json", record)


def rename_classes(shards: Path, names: list[str]) -> None:
    """Other class names in the shards' dataset.json."""
    (shards / "dataset.json").write_text(json.dumps({"class_names": names}))
