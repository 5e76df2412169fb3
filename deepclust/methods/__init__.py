"""The table of methods: a name in the recipe, a class in a file of its own."""

from __future__ import annotations

from collections.abc import Callable

from deepclust.methods.base import Method, Setting
from deepclust.methods.deepcluster.method import DeepCluster
from deepclust.methods.deepercluster.method import DeeperCluster
from deepclust.methods.simclr.method import SimCLR
from deepclust.models.backbone import Backbone

METHODS: dict[str, Callable[[Backbone, Setting], Method]] = {
    "deepcluster": DeepCluster,
    "deepercluster": DeeperCluster,
    "simclr": SimCLR,
}
