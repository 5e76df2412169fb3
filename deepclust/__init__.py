"""Pretrain image backbones by clustering: DeepCluster from a laptop to a cluster.

The names below are the public Python interface. They are imported when first used, so `import
deepclust` and the command line's help do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepclust.clustering.kmeans import kmeans
    from deepclust.clustering.whiten import Whitening
    from deepclust.data.plan import EpochPlan
    from deepclust.data.shards.index import open_index
    from deepclust.export.backbone import load_backbone
    from deepclust.launch.start import pretrain
    from deepclust.recipe import Recipe
    from deepclust.trained.classifier import load_classifier
    from deepclust.trained.export_clusters import load_clusters
    from deepclust.trained.trained_run import load_run

_HOMES = {
    "Recipe": "deepclust.recipe",
    "pretrain": "deepclust.launch.start",
    "open_index": "deepclust.data.shards.index",
    "EpochPlan": "deepclust.data.plan",
    "Whitening": "deepclust.clustering.whiten",
    "kmeans": "deepclust.clustering.kmeans",
    "load_backbone": "deepclust.export.backbone",
    "load_classifier": "deepclust.trained.classifier",
    "load_clusters": "deepclust.trained.export_clusters",
    "load_run": "deepclust.trained.trained_run",
}

__all__ = [  # noqa: RUF022 - in the order of the pipeline
    "Recipe",
    "pretrain",
    "open_index",
    "EpochPlan",
    "Whitening",
    "kmeans",
    "load_backbone",
    "load_classifier",
    "load_clusters",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deepclust' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
