"""The class means of a run: what answers classes where a method that has labels does not itself.

They are made of the labelled images alone (`nearest_mean.py`): at the end of a run, or when they
are first asked for. They belong to the weights of one step, and the run keeps them:

    class_means/STEP.safetensors   centre [D] and means [c, D]; the header has the names of the
                                   classes, their labels, and the hash of the backbone's weights

A file of other weights of that step, such as their average, is replaced. A run that cannot be
written to is asked all the same, and makes them each time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from jaxtyping import Float32
from torch import Tensor

from deepclust.data.shards.find import described, is_remote
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DeepclustError, RecipeError, RunDiffersError
from deepclust.evaluate.frozen import embed_samples
from deepclust.export.backbone import weights_hash
from deepclust.files import atomic_file, fits, read_record, reading, write_tensors
from deepclust.methods.base import Method
from deepclust.methods.embed import Embedder
from deepclust.models import Backbone
from deepclust.run.directory import Run
from deepclust.run.links import refuse_links_out
from deepclust.seeds.table import SeedTable
from deepclust.seeds.table import load as load_seeds
from deepclust.stages.data_index import open_data_index
from deepclust.trained.answers import columns_of
from deepclust.trained.nearest_mean import ClassMeans, NearestMean, class_means
from deepclust.trained.saved import Tell

FOLDER = "class_means"  # of the run, and the key of the facts in a file
AT_END = 20_000  # labelled images that one rank reads at the end of a run, while others wait
REMEDY = "Delete it: the class means are then made again."


def answering(
    run: Run, embedder: Embedder, step: int, tell: Tell, index: Index | None = None
) -> Embedder | str:
    """Return what answers classes: the run's network itself, or its backbone with class means.

    A sentence says why there is neither. `index` is that of the run's images, opened here if None.
    """
    why = columns_of(run, run.recipe, embedder.method)
    if not isinstance(why, str):
        return embedder
    if run.recipe.seeds is None:
        return why
    try:
        return by_means(run, embedder, step, tell, index)
    except DeepclustError as error:
        return f"{why}, and it has no class means: {error}"


def by_means(
    run: Run,
    embedder: Embedder,
    step: int,
    tell: Tell,
    index: Index | None = None,
    most: int | None = None,
) -> Embedder:
    """Return the network of a step with class means, which are made if the run has none of it.

    `most` labelled images are read, or none. Raises `DataError` for labels or images that cannot be
    read, `RunDiffersError` for other shards, `RecipeError` for shards behind URLs without `index`.
    """
    method = kept(run, embedder.method.trunk, step)
    if method is None:
        method = _made(run, embedder, tell, _own_index(run) if index is None else index, most)
        _keep(run, method, step, tell)
    return replace(embedder, method=method.to(embedder.device).eval())


def at_end(run: Run, embedder: Embedder, step: int, tell: Tell, index: Index) -> Method:
    """Return what the export of a run that ends answers by: its method, or that with class means.

    Where there can be none, `tell` hears the reason, and it is the method.
    """
    method = embedder.method
    if run.recipe.seeds is None or not isinstance(columns_of(run, run.recipe, method), str):
        return method
    try:
        return by_means(run, embedder, step, tell, index, AT_END).method
    except DeepclustError as error:
        tell(f"the export has no classifier: {error}")
        return method


def kept(run: Run, trunk: Backbone, step: int) -> NearestMean | None:
    """Return a backbone with the class means that its run has kept, None without these.

    Raises `DataError` for a file that is damaged.
    """
    file = _file(run, step)
    if not file.exists():
        return None
    facts, tensors = _read(file)
    names, labels = facts.get("classes"), facts.get("labels")
    lists = isinstance(names, list) and isinstance(labels, list) and len(names) == len(labels)
    if not lists or not names or not all(fits(count, int) for count in labels or ()):
        raise DataError(f"{file} is damaged: it does not name its classes. {REMEDY}")
    if facts.get("weights") != weights_hash(trunk.export_state()):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"centre": (trunk.dim,), "means": (len(names), trunk.dim)}:
        raise DataError(f"{file} is damaged: its tensors have shapes {shapes}. {REMEDY}")
    means = ClassMeans(tensors["centre"].float(), tensors["means"].float())
    return NearestMean(trunk, means, tuple(map(str, names)), tuple(labels or ()))


def _file(run: Run, step: int) -> Path:
    return run.path / FOLDER / f"{step:08d}.safetensors"


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with reading(file, REMEDY):
        with safetensors.safe_open(file, "pt") as opened:
            facts = dict(json.loads((opened.metadata() or {})[FOLDER]))
        return facts, safetensors.torch.load_file(file)


def _keep(run: Run, method: NearestMean, step: int, tell: Tell) -> None:
    """Write the class means into the run, or tell why they cannot be."""
    facts = {
        "classes": list(method.names),
        "labels": list(method.labels or ()),
        "weights": weights_hash(method.trunk.export_state()),
    }
    try:
        refuse_links_out(run.path)
        with atomic_file(_file(run, step)) as partial:
            tensors = method.means.state_dict()
            write_tensors(partial, tensors, {FOLDER: json.dumps(facts)})
    except (DeepclustError, OSError) as error:
        tell(f"warning: the class means are not kept in the run: {error}")


def _made(run: Run, embedder: Embedder, tell: Tell, index: Index, most: int | None) -> NearestMean:
    """Return the backbone with the means of the labelled images that can be read."""
    table, rows = _labelled(run, embedder, tell, index, most)
    means = class_means(rows, table.classes, table.names)
    return NearestMean(
        embedder.method.trunk, means, tuple(table.names), tuple(table.counts.tolist())
    )


def _labelled(
    run: Run, embedder: Embedder, tell: Tell, index: Index, most: int | None
) -> tuple[SeedTable, Float32[np.ndarray, "m D"]]:
    """Return the labels whose images can be read, and their features.

    Raises `DataError` naming a class that has none left.
    """
    recipe = run.recipe
    assert recipe.seeds is not None
    seeds = load_seeds(index, recipe.seeds, recipe.seed)
    ids = seeds.table.sample_ids
    if most is not None and len(ids) > most:
        raise DataError(
            f"{len(ids):,} labelled images are more than the {most:,} that are read at the end of "
            f"a run. They are read by: deepclust export {run.path} --out labelled.safetensors"
        )

    def embed(images: Tensor) -> Tensor:
        run.alive()
        return embedder(images)

    data = recipe.data.model_copy(update={"max_bad": 1.0})  # those that are bad are left out
    rows, readable = embed_samples(embed, index, data, ids)
    table, notes = seeds.in_round(ids[~readable])
    for note in notes:
        tell(f"warning: {note}")
    return table, rows[readable]


def _own_index(run: Run) -> Index:
    """Return the index of the images that a run was trained on.

    Raises `RunDiffersError` if others are in their place, and `RecipeError` for images behind URLs,
    which a run of anybody's may name.
    """
    data = run.recipe.data
    if is_remote(data.shards):
        raise RecipeError(
            f"{described(data.shards)} are behind URLs, and the labelled images are there. If you "
            f"trust the run, name them yourself: deepclust evaluate {run.path} --train SHARDS "
            "--test SHARDS --with classifier"
        )
    index = open_data_index(data, run.path, build=False)
    if not is_of(run, index):
        raise RunDiffersError(
            f"{described(data.shards)} now has fingerprint {index.fingerprint}, and {run.path} was "
            "trained on other images. Put the shards of the run back in that folder."
        )
    return index


def is_of(run: Run, index: Index) -> bool:
    """Return whether an index is that of the images that a run was trained on."""
    trained: str = read_record(run.path / "data.json", {"fingerprint": str})["fingerprint"]
    return index.fingerprint == trained
