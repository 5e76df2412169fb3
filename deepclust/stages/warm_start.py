"""Starting a run from another one: its weights, or its assignments of any round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from deepclust import __version__
from deepclust.data.shards.find import is_remote
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, RecipeError
from deepclust.export.backbone import is_export, load_backbone
from deepclust.files import write_json
from deepclust.models import Backbone, start_weights
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data
from deepclust.run import labels
from deepclust.run.checkpoint import Checkpoint, counting_weights, load, load_latest
from deepclust.run.directory import Run, exists, has_file, is_done, manifest
from deepclust.run.round_files import read_array, read_facts, read_whitening
from deepclust.stages.data_index import open_data_index, open_kept_index


def load_weights(backbone: Backbone, source: str) -> str:
    """Load the weights of a run's newest checkpoint, one checkpoint, an export, or another source.

    Returns what was loaded, and what of the source was not used (`models/start_weights.py`).
    """
    path = Path(source)
    if start_weights.is_named(source) or (path.is_file() and not is_export(path)):
        return start_weights.load_foreign(backbone, source)
    if exists(path):
        latest = load_latest(Run(path), _refuse_older)
        if latest is None:
            raise DataError(f"init.weights: {path} has no checkpoint yet")
        state = backbone_part(counting_weights(Run(path), latest), Run(path).recipe.method.trunk)
    elif (path / "state.json").exists():
        run, saved = path.parent.parent, Checkpoint(path, *load(path))
        if exists(run):
            weights, trunk = counting_weights(Run(run), saved), Run(run).recipe.method.trunk
        else:
            weights, trunk = saved.parts["model"], "backbone"
        state = backbone_part(weights, trunk)
    elif path.is_file():
        state = dict(load_backbone(path).state_dict())
    else:
        raise DataError(
            f"init.weights: {source} is neither a run, a checkpoint nor a file of weights. A URL "
            "is none: download the file. Libraries: torchvision:NAME, timm:NAME, hf-hub:REPOSITORY"
        )
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        held = _name_of(path)
        fix = f"it holds {held}; set backbone.name={held}" if held else str(error).splitlines()[0]
        if held == backbone.name:
            fix = (
                f"its {held} has other shapes; set data.size and backbone.sobel as they were there"
            )
        raise RecipeError(f"init.weights: {path} is not a {backbone.name}: {fix}") from None
    return f"{path}: {len(state)} tensors"


def other_normalisation(source: str, data: Data) -> str:
    """Return what to set where start weights saw otherwise normalised images, else ""."""
    own = start_weights.normalisation_of(source)
    if own is None or (own.mean, own.std) == (tuple(data.mean), tuple(data.std)):
        return ""
    mean, std = [*own.mean], [*own.std]
    return (
        f"; their images were normalised otherwise than this recipe's. Add data.mean='{mean}' "
        f"data.std='{std}' to train on as they were trained"
    )


def _name_of(path: Path) -> str | None:
    """Return the backbone of a run, a checkpoint or an export, None where nothing says it."""
    if path.is_file():
        return load_backbone(path).name
    run = path if exists(path) else path.parent.parent
    return Run(run).recipe.backbone.name if exists(run) else None


def _refuse_older(why: str) -> None:
    """Raise `DataError`: an older checkpoint is taken only when it is asked for by name."""
    raise DataError(
        f"init.weights: the newest weights cannot be taken: {why}. Name the checkpoint to start "
        "from: init.weights=RUN/checkpoints/STEP"
    )


def import_assignments(run: Run, recipe: Recipe, index: Index) -> None:
    """Make round 0 from another run's round: as it is where the data are equal, else by key."""
    folder = run.round(0)
    if is_done(folder / "assignments"):
        return
    source = Path(str(recipe.init.assignments))
    if not is_done(source / "assignments"):
        raise DataError(
            f"init.assignments: {source} is not a finished round (runs/NAME/rounds/0003)"
        )
    centroids = np.array(read_array(source / "centroids", "centroids.npy", run.alive, dims=3))
    if centroids.shape[1] != recipe.clustering.k:
        raise RecipeError(
            f"init.assignments: {source} has {centroids.shape[1]} clusters and cluster.k is "
            f"{recipe.clustering.k}; set cluster.k={centroids.shape[1]}"
        )
    assignments = read_array(source / "assignments", "assignments.npy", run.alive, dims=2)
    _check_heads(recipe, len(assignments), source)
    inputs = manifest(source / "assignments")["inputs"]
    if recipe.clustering.supers not in (1, inputs.get("supers", 1)):
        raise RecipeError(
            f"init.assignments: {source} was clustered with cluster.supers="
            f"{inputs.get('supers', 1)}, so its ids are not those of {recipe.clustering.supers} "
            "super-clusters; take a round of a run with that number"
        )
    if inputs["data"] != index.fingerprint:
        assignments = _join(assignments, _index_of(source), index)
    _write_round(run, source, index, np.asarray(assignments), centroids)


def export_meta(run: Run) -> dict[str, Any]:
    """Return what an export records: how images were normalised, and the classes of the seeds."""
    recipe, data = run.recipe, run.recipe.data
    meta = {
        "mean": list(data.mean), "std": list(data.std), "resize": data.short_side,
        "method": recipe.method.name, "deepclust": __version__,
    }  # fmt: skip
    for number in run.rounds()[-1:]:
        stage = run.round(number) / "centroids"
        if has_file(stage, "prototypes.json"):
            meta["classes"] = read_facts(stage, "prototypes.json")["classes"]
    if "classes" not in meta and (names := labels.class_names(run)):
        meta["classes"] = list(names)
    return meta


def backbone_part(tensors: dict[str, Any], trunk: str = "backbone") -> dict[str, Any]:
    """Return the backbone's tensors of a method's state dict.

    `trunk` is its module there.
    """
    prefix = f"{trunk}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _index_of(source: Path) -> Index:
    other = Run(source.parent.parent)
    data = other.recipe.data
    if is_remote(data.shards):  # it may be anybody's run, and keys and names are enough
        return open_kept_index(data, other.path)
    return open_data_index(data, other.path, build=False)


def _check_heads(recipe: Recipe, heads: int, source: Path) -> None:
    refresh = recipe.method.round
    wanted = refresh.heads if refresh else 1
    if heads != wanted:
        raise RecipeError(
            f"init.assignments: {source} has {heads} clusterings of its samples and method "
            f"{recipe.method.name} trains on {wanted}: take a round of a run of that method"
        )


def _join(
    assignments: Int32[np.ndarray, "heads m"], theirs: Index, ours: Index
) -> Int32[np.ndarray, "heads n"]:
    """Their assignments on our sample ids, joined by shard and key, or -1 where they have none."""
    table = _keys(theirs).append_column("row", pa.array(np.arange(len(theirs))))
    joined = _keys(ours).append_column("id", pa.array(np.arange(len(ours))))
    joined = joined.join(table, ["shard", "key"], join_type="left outer").sort_by("id")
    rows = joined["row"].fill_null(-1).to_numpy()
    result = np.where(rows < 0, -1, np.asarray(assignments)[:, rows]).astype(np.int32)
    if not (result >= 0).any():
        raise DataError(
            "init.assignments: no sample of data.shards has a shard and key of that run"
        )
    return result


def _keys(index: Index) -> pa.Table:
    names = np.array(index.names)
    shards = np.repeat(names, np.diff(index.bases))
    return pa.table({"shard": pa.array(shards), "key": pa.array(list(index.keys))})


def _write_round(
    run: Run, source: Path, index: Index, assignments: np.ndarray, centroids: np.ndarray
) -> None:
    inputs = {"data": index.fingerprint, "from": str(source)}
    folder = run.round(0)
    if is_done(source / "whitening"):
        whitening = read_whitening(source)
        run.commit(
            folder / "whitening", lambda d: whitening.save(d / "whitening.safetensors"), inputs
        )
    run.commit(folder / "centroids", lambda d: np.save(d / "centroids.npy", centroids), inputs)

    def fill(stage: Path) -> None:
        np.save(stage / "assignments.npy", assignments)
        np.save(stage / "distances.npy", np.full(assignments.shape, np.nan, np.float32))
        statistics = read_facts(source / "assignments", "statistics.json")
        write_json(stage / "statistics.json", {**statistics, "round": 0})

    run.commit(folder / "assignments", fill, inputs)
