"""The clusters of a run as JSON that FiftyOne and Label Studio read, without either installed.

FiftyOne: `{"samples": [...]}`, each as `fiftyone.Sample.to_dict()` writes it. It is loaded by
`dataset.add_samples(fo.Sample.from_dict(s) for s in json.load(open(FILE))["samples"])`.

Label Studio: a list of tasks with a prediction (labelstud.io/guide/predictions). Images are of its
local storage with the document root `/`. The project's interface has an Image named "image" and
Choices named "cluster".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cluster_jobs.results.assignments import Clusters, clustered
from cluster_jobs.results.samples import has_paths, parts_of
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError
from deepclust.files import atomic_file, target_of
from deepclust.run.directory import open_run

Record = dict[str, Any]


def _fiftyone(path: str, label: str, facts: Record, name: str) -> Record:
    return {
        "filepath": path, "tags": [], "metadata": None, "_media_type": "image",
        "cluster": {"_cls": "Classification", "tags": [], "label": label}, **facts,
    }  # fmt: skip


def _label_studio(path: str, label: str, facts: Record, name: str) -> Record:
    choice = {
        "from_name": "cluster", "to_name": "image", "type": "choices",
        "value": {"choices": [label]},
    }  # fmt: skip
    image = f"/data/local-files/?d={quote(path.lstrip('/'))}"
    predictions = [{"model_version": name, "result": [choice]}]
    return {"data": {"image": image, **facts}, "predictions": predictions}


# the record of an image, and what stands before and after all of them
FORMATS: dict[str, tuple[Callable[[str, str, Record, str], Record], str, str]] = {
    "fiftyone": (_fiftyone, '{"samples": [', "]}"),
    "label-studio": (_label_studio, "[", "]"),
}


def form_of(out: Path) -> str | None:
    """Return the format that a name ends with, as in clusters.fiftyone.json."""
    return next((form for form in FORMATS if out.name.endswith(f".{form}.json")), None)


def write_json_of(
    run_dir: Path,
    out: Path,
    form: str,
    round: int | None = None,
    *,
    remote: bool = False,
    emit: Callable[[str], None],
) -> None:
    """Write the clusters of head 0 for a viewer, image by image.

    Raises `RecipeError` for an unknown format, and where the files of the images are not known.
    """
    if form not in FORMATS:
        raise RecipeError(f"--format {form}: give {' or '.join(FORMATS)}")
    target, run = target_of(out), open_run(run_dir)
    record, before, after = FORMATS[form]
    with clustered(run, round, remote, emit) as (index, known):
        if not has_paths(index):
            raise RecipeError(
                f"the images of {run_dir} are in shards that do not say from which files they were "
                f"made, and a viewer needs files. Write them: deepclust assignments {run_dir} "
                "--folders OUT"
            )
        name = f"deepclust {run.path.resolve().name}"
        with atomic_file(target) as partial, open(partial, "w", encoding="utf-8") as file:
            separator = before
            for path, label, facts in _images(index, known):
                file.write(separator + "\n" + json.dumps(record(path, label, facts, name)))
                separator = ","
            file.write(f"\n{after}\n" if separator == "," else f"{before}{after}\n")


def _images(index: Index, known: Clusters) -> Iterator[tuple[str, str, Record]]:
    """Yield file, cluster and facts of every image that has a cluster and a file."""
    for part in parts_of(index):
        clusters = known.assignments[0, part.first : part.last]
        paths = [None] * len(part.keys) if part.paths is None else part.paths.to_pylist()
        for place in np.flatnonzero(clusters >= 0).tolist():
            if (path := paths[place]) is None:
                continue
            number = int(clusters[place])
            label = str(number) if known.classes is None else known.classes[number] or str(number)
            facts: Record = {"key": str(part.keys[place]), "sample_id": part.first + place}
            if known.distances is not None:
                distance = float(known.distances[0, part.first + place])
                facts["distance"] = distance if np.isfinite(distance) else None
            yield os.path.abspath(path), label, facts
