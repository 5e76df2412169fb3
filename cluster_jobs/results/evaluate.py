"""Frozen features of a finished run for the evaluators, and the export of its backbone.

Features of the labelled train and test shards come from the exported backbone (centre crop, as in
extraction); the evaluators in `deepclust.evaluate` see arrays only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64

from deepclust.data.images.crops import CentreCrop, Crop, to_float
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.index import Index, open_index
from deepclust.errors import DataError
from deepclust.evaluate import evaluate_features
from deepclust.evaluate.nearest_prototype import prototypes
from deepclust.files import read_json, write_json
from deepclust.models import Backbone, build_backbone
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data
from deepclust.run.checkpoint import Checkpoint, load_latest
from deepclust.run.directory import Run, open_run
from deepclust.seeds.table import load as load_seeds
from deepclust.stages.export import Exported, export_backbone
from deepclust.stages.warm_start import backbone_part, export_meta

DIM = 64  # of the whitening that judges a method without a clustering
Scores = dict[str, dict[str, float]]


def evaluate_run(
    run: Path, train: str, test: str, tell: Callable[[str], None] = lambda text: None
) -> Scores:
    """Evaluate a run's backbone on labelled shards; the scores also land in `evaluations/`.

    A seeded run is also judged by its prototypes, where `train` are the shards it was trained on.
    `tell` hears why not, if not.
    """
    found = open_run(run)
    latest, data = _latest(found), found.recipe.data
    backbone, index = _backbone(found, latest), open_index(train)
    train_x, train_y, ids = features_of(backbone, index, data)
    probes = labelled_features(backbone, open_index(test), data)
    dim = found.recipe.cluster.dim if found.recipe.cluster else DIM
    scores = evaluate_features((train_x, train_y), probes, dim=dim)
    if (seeds := found.recipe.seeds) is not None:
        try:
            known, labels = seeds_of(found, index)
            rows, place = np.searchsorted(ids, known), np.isin(known, ids)
            nearest = prototypes(
                train_x, rows[place], labels[place], *probes, dim=dim, refine=seeds.refine
            )
            scores["prototypes"] = dict(nearest)
        except DataError as error:
            tell(f"the seeds' prototypes are not judged: {error}")
    record = {"step": latest.state.step, "train": train, "test": test, "scores": scores}
    write_json(found.path / "evaluations" / f"{latest.state.step:08d}.json", record)
    return scores


def export_run(run: Path, out: Path, format_: str) -> Exported:
    """Export the backbone of a run's newest checkpoint."""
    found = open_run(run)
    return export_backbone(load_run(found), out, format_, meta=export_meta(found))


def load_run(run: Run) -> Backbone:
    """The backbone of a run's newest readable checkpoint, in eval mode."""
    return _backbone(run, _latest(run))


def _latest(run: Run) -> Checkpoint:
    latest = load_latest(run, lambda text: None)
    if latest is None:
        raise DataError(f"{run.path} has no checkpoint yet; let it run, then try again")
    return latest


def _backbone(run: Run, latest: Checkpoint) -> Backbone:
    backbone = fresh_backbone(run.recipe)
    backbone.load_state_dict(backbone_part(latest.parts["model"]))
    return backbone.eval()


def fresh_backbone(recipe: Recipe) -> Backbone:
    """The backbone as a run of this recipe begins with it."""
    return build_backbone(
        recipe.backbone.name, sobel=recipe.backbone.sobel,
        image_size=recipe.data.size, seed=recipe.seed,
    ).eval()  # fmt: skip


def labelled_features(
    backbone: Backbone, index: Index, data: Data
) -> tuple[Float32[np.ndarray, "n D"], np.ndarray]:
    """Features and labels of every readable, labelled sample, in sample order."""
    return features_of(backbone, index, data)[:2]


def seeds_of(run: Run, index: Index) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Sample ids and labels of a run's seeds; `DataError` when these are not the run's shards."""
    assert run.recipe.seeds is not None
    began = read_json(run.path / "data.json")["fingerprint"]
    if index.fingerprint != began:
        raise DataError(f"{index.shards[0].parent} are not the shards that {run.path} trained on")
    seeds = load_seeds(index, run.recipe.seeds, run.recipe.seed).table
    return seeds.ids, label_numbers(index, seeds.names)[seeds.classes]


def label_numbers(index: Index, names: list[str]) -> Int64[np.ndarray, " classes"]:
    """The shards' label of every class name; they are told apart by name in tables of labels."""
    assert index.labels is not None
    known = {int(label) for label in np.unique(index.labels)}
    given = index.class_names or [str(label) for label in range(max(known) + 1)]
    missing = [name for name in names if name not in given]
    if missing:
        raise DataError(
            f"the seeds' classes {missing[:5]} are not among those of {index.shards[0].parent} "
            f"({given[:5]}, ...): name them as its dataset.json does, or evaluate on other shards"
        )
    return np.array([given.index(name) for name in names])


def features_of(
    backbone: Backbone, index: Index, data: Data
) -> tuple[Float32[np.ndarray, "n D"], np.ndarray, Int64[np.ndarray, " n"]]:
    """Features, labels and sample ids of every readable, labelled sample, in sample order."""
    if index.labels is None:
        raise DataError(
            f"{index.shards[0].parent} has no labels: evaluation needs KEY.cls or KEY.json members"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device)
    crops = (Crop(CentreCrop(data.size, data.short_side)),)
    ids = np.flatnonzero(np.asarray(index.labels) >= 0)
    requests = (
        Request(part, positions=part, key=0, crops=crops)
        for part in np.array_split(ids, max(1, len(ids) // data.extract_batch))
    )
    rows, used = [], []
    loader = Loader(index, data.workers, max_pixels=data.max_pixels)
    try:
        for loaded in loader.stream(requests):
            with torch.inference_mode():
                images = to_float(loaded.images[0].to(device), data.mean, data.std)
                rows.append(backbone(images).float().cpu().numpy())
            used.append(~np.isin(loaded.sample_ids, [bad.sample_id for bad in loaded.bad]))
    finally:
        loader.close()
    usable = np.concatenate(used)
    if (~usable).mean() > data.max_bad:
        raise DataError(
            f"{(~usable).sum()} of {len(ids)} images of {index.shards[0].parent} cannot be read, "
            f"more than data.max_bad={data.max_bad} allows"
        )
    return np.concatenate(rows)[usable], np.asarray(index.labels)[ids][usable], ids[usable]
