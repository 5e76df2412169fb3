"""The index that a recipe's `data` section means: the only place that reads its keys for it."""

from __future__ import annotations

from pathlib import Path

from deepclust.data.shards.check import check_columns
from deepclust.data.shards.fields import AUTO, NONE
from deepclust.data.shards.find import Shards
from deepclust.data.shards.index import Index, open_index
from deepclust.data.shards.manifest import read_manifest
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data


def open_data_index(data: Data, run_dir: Path | None = None, *, build: bool = True) -> Index:
    """Return the index of `data.shards`; raises what `open_index` raises."""
    fields = {"image": data.image, "labels": data.labels}
    return open_index(data.shards, data.index, run_dir, **fields, build=build)


def open_kept_index(data: Data, run_dir: Path) -> Index:
    """Return the index that a run has kept of shards behind a URL, without asking for them.

    Its shards have names, and cannot be read. Raises `DataError` where there is no such index.
    """
    folder = run_dir / "index" if data.index is None else Path(data.index)
    manifest = read_manifest(folder)
    check_columns(folder, manifest)
    return Index(folder, [folder / entry["name"] for entry in manifest["shards"]], manifest)


def open_labelled(
    shards: Shards,
    data: Data,
    index: str | Path | None = None,
    run_dir: Path | None = None,
    *,
    build: bool = True,
) -> Index:
    """Return the index of shards read in the same way, with their labels in any case."""
    labels = AUTO if data.labels == NONE else data.labels
    return open_index(shards, index, run_dir, image=data.image, labels=labels, build=build)


def idle_weights(recipe: Recipe) -> list[str]:
    """Return the note that weights of sources have no effect, where they have none."""
    if recipe.data.weights is None or recipe.cluster is None or recipe.method.mode == "all":
        return []
    return [
        "data.shards: the weights have no effect, since this method draws equally from all "
        "clusters, whatever their sources"
    ]
