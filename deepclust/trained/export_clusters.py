"""Exports that answer with clusters: `deepclust export RUN --classifier`.

- `onnx`, `torch-export`: one file from normalised images to clusters, distances and margins. The
  names of the clusters are in its facts as `names`.
- `safetensors`: the rule travels with the backbone, under the prefix `clusters/`.
- `torchvision`, `timm`, `hf`: other libraries would not load such tensors, so they are in a file
  beside the weights: `clusters.safetensors` in a folder, else `NAME.clusters.safetensors`.

`load_clusters(FILE)` reads the rule of the last four: features in, clusters out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from deepclust import files
from deepclust.errors import DataError, RecipeError
from deepclust.export import elsewhere
from deepclust.export.backbone import CLUSTERS, HEADER, Head, part_of, weights_hash
from deepclust.export.program import PROGRAMS, Traced
from deepclust.trained.cluster_head import (
    OUTPUTS,
    OWN,
    ClusterHead,
    Found,
    ImagesToClusters,
    cluster_head_from,
    same_clusters,
)

BESIDE = "clusters.safetensors"
REMEDY = "Write one with `deepclust export RUN --classifier --out FILE`."


def write_program(module: ImagesToClusters, path: Path, format: str, facts: dict[str, Any]) -> None:
    """Write images to clusters as one file, read it back and compare.

    `facts` go into the file, with the names of the clusters. Raises `DataError` where the file,
    read back, answers otherwise.
    """
    program = PROGRAMS[format]
    about = module.head.about
    facts = {**facts, "name": module.name, "names": about["names"], "round": about["round"]}
    traced = Traced(module, module.image_size, OUTPUTS, facts)
    with files.atomic_file(path) as partial, elsewhere.quiet():
        program.write(traced, partial)
        outputs = program.read(partial)
        random = torch.Generator().manual_seed(0)
        for count in (1, 3):
            images = torch.randn(count, 3, module.image_size, module.image_size, generator=random)
            with torch.no_grad():
                same = same_clusters(Found(*module(images)), Found(*outputs(images)))
            if not same:
                raise DataError(
                    "the file, read back, gives other clusters; nothing was written. Use another "
                    "format, and report this"
                )


def usage_of(path: Path, format: str) -> str:
    """Return lines that load a program of images to clusters."""
    return PROGRAMS[format].usage(path, OUTPUTS)


def beside_usage(path: Path) -> str:
    """Return lines that load a rule."""
    return (
        f"from deepclust import load_clusters\ntell = load_clusters({str(path)!r})\n"
        "# clusters, distances, margins = tell(features)"
    )


def part_of_head(head: ClusterHead, method: str) -> Head:
    """Return a rule as what travels with a backbone.

    Raises `RecipeError` for rows that are not made of the backbone's features alone.
    """
    if head.about["rows"] == OWN:
        raise RecipeError(
            f"--classifier: the clusters of {method} are those of what it makes of the features, "
            "which only whole programs hold: use --format onnx or torch-export"
        )
    tensors = {name: tensor.contiguous() for name, tensor in head.tensors().items()}
    about = {**head.about, "weights": weights_hash(tensors)}

    def check(path: Path) -> None:
        again = load_clusters(path)
        random = torch.Generator().manual_seed(0)
        rows = torch.randn(3, int(about["dim"]), generator=random)
        pairs = zip(again(rows), head(rows), strict=True)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
            raise DataError("the clusters, read back, are others; nothing was written")

    return Head(about, tensors, check)


def content_beside(part: Head) -> bytes:
    """Return the bytes of a file that holds a rule alone."""
    tensors = {f"{CLUSTERS}/{name}": tensor for name, tensor in part.tensors.items()}
    return safetensors.torch.save(tensors, metadata={HEADER: json.dumps({CLUSTERS: part.about})})


def place_beside(path: Path) -> Path:
    """Return where the rule of weights for other libraries is: beside their file."""
    return path.with_name(f"{path.stem}.{BESIDE}")


def load_clusters(path: str | Path) -> ClusterHead:
    """Return the rule of an export that was written with `--classifier`, on the CPU.

        clusters, distances, margins = load_clusters(FILE)(load_backbone(FILE)(images))

    `names[j]` is the class of cluster j, or "cluster J". Nothing in the file is executed.

    Raises `DataError` for a file that is broken, or that has no clusters.
    """
    path = files.path_of(path, "path")
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file. {REMEDY}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
        tensors = part_of(safetensors.torch.load_file(path), CLUSTERS)
    except Exception as error:  # libraries raise what they like for a damaged file
        raise DataError(f"{path}: not a whole safetensors file ({error}). {REMEDY}") from error
    about = header.get(CLUSTERS) if isinstance(header, dict) else None
    if not isinstance(about, dict):
        raise DataError(f"{path} has no clusters. {REMEDY}")
    if weights_hash(tensors) != about.get("weights"):
        raise DataError(f"{path}: the clusters are not those that were exported. Export it again.")
    try:
        return cluster_head_from(about, tensors)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
